"""What a bad worker costs the others: rounds a second with and without it.

    python -m benchmarks.badworker --rounds 400 --rate 1000

Four workers with accounts of their own echo a model of 0.1 MB at once, in synchronous rounds, everything durable. A
fifth account, in a process of its own, does one of the things below so often a second, from before the first round to
after the last. Since attacker, broker and everybody else share this machine, "elsewhere" is the same flood into a queue
that nobody of the run reads: what that takes is the machine's and the broker's share. The aim: at least 0.9 of it.

"The same update for ever" does not end: rounds without a deadline wait for whoever has sent one. Choose with --kinds.

Figures, machine and versions: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import itertools
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import numpy as np
import pika
import pika.exceptions

from benchmarks.echo import model_of
from benchmarks.rounds import serve_fedmq
from broker.admin import Admin
from broker.amqp.node import PrivateNode
from broker.messages import Event, EventKind, Hello, Mode, Role, Update, UpdateId
from broker.topology import CONTROL, EVENTS, UPDATES
from broker.wire import encode

NBYTES = 100_000
WORKERS = 4
BAD = "mallory"
PASSWORD = "benchmark"  # noqa: S105 - of accounts on a private node that goes with this process

#: What a run comes to its end beside.
ENDING = [
    "elsewhere",
    "rubbish",
    "in another's name",
    "hellos",
    "heartbeats",
    "3 MB each, elsewhere",
    "3 MB each",
    "connections",
]

Send = Callable[[Any, int], None]


def publish(channel: Any, exchange: str, key: str, body: bytes, **more: Any) -> None:
    """One message of the bad account's."""
    channel.basic_publish(exchange, key, body, pika.BasicProperties(user_id=BAD, delivery_mode=2, **more))


def update(run: str, worker: str, seq: int) -> bytes:
    """A good update."""
    model = model_of(NBYTES)
    tensors = {t.name: np.full(t.shape, 1e-3, np.float32) for t in model.tensors}
    return encode(
        Update(
            run=run,
            id=UpdateId(worker, "bad", seq),
            base_version=0,
            base_epoch=1,
            mode=Mode.DELTA,
            examples=1,
            model=model,
            tensors=tensors,
        )
    )


def attacks(run: str) -> dict[str, tuple[float, Send]]:
    """What a bad worker does: how often, as a share of the rate, and once."""
    key, own, forged = f"{run}.{BAD}", update(run, BAD, 0), update(run, "w0", 10**6)
    # As an evaluator: for a worker who is here and does not answer, synchronous rounds without a deadline wait anyway.
    hello = encode(Hello(run=run, worker=BAD, incarnation="i", role=Role.EVALUATOR))
    data = {"incarnation": "i", "role": "evaluator"}
    beat = encode(Event(run=run, kind=EventKind.HEARTBEAT, source=BAD, time=0.0, data=data))
    giant = bytes(3_000_000)
    return {
        "elsewhere": (1.0, lambda channel, _n: publish(channel, "", "elsewhere", b"rubbish")),
        "rubbish": (1.0, lambda channel, _n: publish(channel, UPDATES, key, b"rubbish")),
        "the same update for ever": (0.5, lambda channel, _n: publish(channel, UPDATES, key, own)),
        "in another's name": (0.5, lambda channel, _n: publish(channel, UPDATES, f"{run}.w0", forged)),
        "hellos": (1.0, lambda channel, _n: publish(channel, CONTROL, key, hello)),
        "heartbeats": (1.0, lambda channel, _n: publish(channel, EVENTS, f"{run}.heartbeat.{BAD}", beat)),
        "3 MB each, elsewhere": (0.01, lambda channel, _n: publish(channel, "", "elsewhere", giant)),
        "3 MB each": (0.01, lambda channel, _n: publish(channel, UPDATES, key, giant)),
        "chunks without a manifest": (
            0.01,
            lambda channel, n: publish(channel, UPDATES, f"{key}.chunk", giant, message_id=f"{BAD}/i/{n}#0"),
        ),
    }


def attack(kind: str, url: str, run: str, rate: float) -> None:
    """Do it until somebody ends this process."""
    if kind == "connections":
        while True:
            pika.BlockingConnection(pika.URLParameters(url)).close()
            time.sleep(10 / rate)
    share, send = attacks(run)[kind]
    pause = 1 / (rate * share)
    channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
    due = time.perf_counter()
    for number in itertools.count():
        send(channel, number)
        due = max(due + pause, time.perf_counter() - 1.0)
        if (early := due - time.perf_counter()) > 0.002:
            channel.connection.process_data_events(early)


@contextmanager
def attacked(kind: str, url: str, run: str, rate: float) -> Iterator[None]:
    """While somebody does it."""
    if not kind:
        yield
        return
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "benchmarks.badworker",
            "--attack",
            kind,
            "--url",
            url,
            "--run",
            run,
            "--rate",
            f"{rate}",
        ]
    )
    try:
        yield
        if process.poll() is not None:
            raise RuntimeError(f"the attacker ({kind}) has ended by itself")
    finally:
        process.kill()
        process.wait()


def account(node: PrivateNode, name: str) -> str:
    """The address of an account of this name, made if it is not there."""
    admin = Admin(node.management_url, node.user, node.password)
    admin.put(f"/users/{name}", {"password": PASSWORD, "tags": ""})
    admin.put(f"/permissions/%2F/{name}", {"configure": ".*", "write": ".*", "read": ".*"})
    return node.url.replace(f"{quote(node.user)}:{quote(node.password)}", f"{name}:{PASSWORD}")


def rounds_a_second(node: PrivateNode, kind: str, rounds: int, rate: float) -> float:
    """By the median of a round's seconds."""
    run = f"bad-{secrets.token_hex(3)}"
    echoes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.echo", account(node, f"w{index}"), run, f"w{index}", str(NBYTES)]
        )
        for index in range(WORKERS)
    ]
    try:
        with attacked(kind, account(node, BAD), run, rate):
            seconds = serve_fedmq(node.url, run, NBYTES, WORKERS, rounds)
        for process in echoes:
            process.wait(60)
    finally:
        for process in echoes:
            process.kill()
            process.wait()
    return 1 / statistics.median(seconds[len(seconds) // 4 :])


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--rate", type=float, default=1000.0, help="messages a second")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=ENDING, help="what the bad worker does, besides nothing")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.attack:
        attack(arguments.attack, arguments.url, arguments.run, arguments.rate)
        return
    kinds = ["", *arguments.kinds]
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    with PrivateNode() as node:
        declare_elsewhere(node)
        for _ in range(arguments.repeat):
            for kind in kinds:
                found[kind].append(rounds_a_second(node, kind, arguments.rounds, arguments.rate))
    medians = {kind: statistics.median(figures) for kind, figures in found.items()}
    print("| what the bad worker does | rounds/s (median, min-max) | to nothing | to the same elsewhere |")
    print("| --- | --- | --- | --- |")
    for kind in kinds:
        control = "3 MB each, elsewhere" if "MB" in kind or "chunks" in kind else "elsewhere"
        ratio = f"{medians[kind] / medians[control]:.2f}" if kind and "elsewhere" not in kind else ""
        low, high = min(found[kind]), max(found[kind])
        print(
            f"| {kind or 'nothing'} | {medians[kind]:.1f} ({low:.1f}-{high:.1f}) | {medians[kind] / medians['']:.2f} "
            f"| {ratio} |"
        )


def declare_elsewhere(node: PrivateNode) -> None:
    """A queue that drops what is too much, and that nobody reads."""
    connection = pika.BlockingConnection(pika.URLParameters(node.url))
    connection.channel().queue_declare(
        "elsewhere", durable=True, arguments={"x-max-length": 1000, "x-max-length-bytes": 30_000_000}
    )
    connection.close()


if __name__ == "__main__":
    main()
