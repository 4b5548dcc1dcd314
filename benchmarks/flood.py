"""A publisher, as a process: so many updates, many on their way at once, each confirmed.

    python -m benchmarks.flood URL RUN NAME NBYTES COUNT [--raw | --stock]

With ``--raw`` prepared bytes of the same size go the same way. With ``--stock`` they go as whole bodies through pika's
BlockingConnection, each confirmed before the next, as its documentation shows.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from concurrent.futures import Future

import numpy as np
import pika

from benchmarks.echo import BODY, joined, model_of, raw_message, update_of
from broker.amqp.transport import AmqpWorkerTransport
from broker.messages import Parameters, Plan
from broker.topology import UPDATES
from broker.transport import Outgoing

#: Bytes on their way.
WINDOW = 32 * 2**20


def main() -> None:
    """Publish, and say how many seconds it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("run")
    parser.add_argument("name")
    parser.add_argument("nbytes", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--raw", action="store_true")
    parser.add_argument("--stock", action="store_true")
    arguments = parser.parse_args()
    if arguments.stock:
        stock(arguments.url, arguments.run, arguments.name, arguments.nbytes, arguments.count)
        return
    transport = joined(arguments.url, arguments.run, arguments.name, lambda _item: None)
    model = model_of(arguments.nbytes)
    tensors = {t.name: np.full(t.shape, 1e-3, np.float32) for t in model.tensors}
    version = Parameters(
        run=arguments.run, epoch=1, version=0, plan=Plan(), digest="0" * 64, model=model, tensors=tensors
    )
    on_way: deque[tuple[Outgoing, Future[None]]] = deque()
    most = max(1, WINDOW // arguments.nbytes)
    for seq in range(arguments.count):
        if arguments.raw:
            message = raw_message(arguments.nbytes, f"{arguments.name}/bench/{seq}")
        else:
            message = update_of(version, arguments.run, arguments.name, seq, tensors)
        on_way.append((message, transport.publish(message)))
        while len(on_way) >= most:
            settle(transport, *on_way.popleft())
    while on_way:
        settle(transport, *on_way.popleft())
    transport.close()


def settle(transport: AmqpWorkerTransport, message: Outgoing, sent: Future[None]) -> None:
    """Wait for a confirmation, and publish again what was refused, as from a full outbox."""
    while sent.exception() is not None:
        time.sleep(0.05)
        sent = transport.publish(message)


def stock(url: str, run: str, name: str, nbytes: int, count: int) -> None:
    """The same through pika as it comes."""
    channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
    channel.confirm_delivery()
    body = (BODY * (nbytes // len(BODY) + 1))[:nbytes]
    for _ in range(count):
        channel.basic_publish(UPDATES, f"{run}.{name}", body, pika.BasicProperties(delivery_mode=2), mandatory=True)


if __name__ == "__main__":
    main()
