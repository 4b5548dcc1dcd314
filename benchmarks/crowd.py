"""Many connected workers in one process, each with connections of its own and one update on its way at a time.

    python -m benchmarks.crowd URL RUN FIRST COUNT NBYTES UPDATES [--raw]

Workers ``w<FIRST>`` and the COUNT - 1 after it say hello, hear of every version, say every two seconds that they are
alive, and publish UPDATES updates between them: the next when the last is confirmed. They begin when a line comes in,
and say one when they could. With ``--raw`` prepared bytes of the same size go the same way.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue

import numpy as np

from benchmarks.echo import joined, model_of, raw_message, update_of
from broker.amqp.transport import AmqpWorkerTransport
from broker.messages import Event, EventKind, Parameters, Plan
from broker.transport import Outgoing
from broker.wire import encode

BEAT_SECONDS = 2.0
#: Workers that connect at the same time.
AT_ONCE = 8
PAUSE = 0.05


class Crowd:
    """So many workers."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._run: str = arguments.run
        self._nbytes: int = arguments.nbytes
        self._raw: bool = arguments.raw
        model = model_of(arguments.nbytes)
        self._tensors = {t.name: np.full(t.shape, 1e-3, np.float32) for t in model.tensors}
        self._version = Parameters(
            run=self._run, epoch=1, version=0, plan=Plan(), digest="0" * 64, model=model, tensors=self._tensors
        )
        self._bytes = raw_message(arguments.nbytes, "")
        names = [f"w{arguments.first + index}" for index in range(arguments.count)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            ends = pool.map(lambda name: joined(arguments.url, self._run, name, lambda _item: None), names)
            self.workers: dict[str, AmqpWorkerTransport] = dict(zip(names, ends, strict=True))
        self._seq = dict.fromkeys(names, 0)
        self._over = threading.Event()
        self._alive = threading.Thread(target=self._beat, daemon=True)
        self._alive.start()

    def publish(self, updates: int) -> None:
        """Publish so many in all, and wait until they are confirmed."""
        done: SimpleQueue[tuple[str, Outgoing, Future[None]]] = SimpleQueue()

        def send(name: str, message: Outgoing) -> None:
            self.workers[name].publish(message).add_done_callback(lambda sent: done.put((name, message, sent)))

        rest = updates
        for name in list(self.workers)[:updates]:
            send(name, self._next(name))
            rest -= 1
        waiting = updates - rest
        while waiting:
            name, message, sent = done.get()
            if sent.exception() is not None:
                time.sleep(PAUSE)
                send(name, message)
            elif rest:
                rest -= 1
                send(name, self._next(name))
            else:
                waiting -= 1

    def close(self) -> None:
        """All leave."""
        self._over.set()
        self._alive.join()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda worker: worker.close(), self.workers.values()))

    def _next(self, name: str) -> Outgoing:
        seq = self._seq[name]
        self._seq[name] += 1
        if self._raw:
            return replace(self._bytes, message_id=f"{name}/bench/{seq}")
        return update_of(self._version, self._run, name, seq, self._tensors)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            for name, worker in self.workers.items():
                facts = {"state": "training", "version": 0, "confirmed": self._seq[name], "role": "trainer"}
                data = {**facts, "incarnation": "bench"}
                event = Event(run=self._run, kind=EventKind.HEARTBEAT, source=name, time=time.time(), data=data)
                worker.event("heartbeat", Outgoing(body=encode(event), headers={"run": self._run}))


def main() -> None:
    """Connect, say so, wait for a line, publish, leave."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("run")
    parser.add_argument("first", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("nbytes", type=int)
    parser.add_argument("updates", type=int)
    parser.add_argument("--raw", action="store_true")
    arguments = parser.parse_args()
    crowd = Crowd(arguments)
    print("ready", flush=True)
    sys.stdin.readline()
    crowd.publish(arguments.updates)
    crowd.close()


if __name__ == "__main__":
    main()
