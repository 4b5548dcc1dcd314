"""Labelled points at which a process kills itself, for tests only: ``python -m tests.chaos.points LABEL:N ARGUMENT…``

The command is ``fedmq ARGUMENT…`` with one function wrapped by name, so the product has no hooks. At the nth passing
of the label the process gets SIGKILL, from within, between two of its own instructions.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["AGGREGATOR", "WORKER", "announcement", "install"]

Function = Callable[..., Any]
Wrap = Callable[[Function, Callable[[], None]], Function]


def announcement(label: str) -> str:
    """What the process says last, on stderr."""
    return f"killed at {label}"


def before(function: Function, pass_by: Callable[[], None]) -> Function:
    """The label is passed when ``function`` is called."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **more: Any) -> Any:
        pass_by()
        return function(*arguments, **more)

    return wrapped


def after(function: Function, pass_by: Callable[[], None]) -> Function:
    """The label is passed when ``function`` has returned, before its caller knows."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **more: Any) -> Any:
        result = function(*arguments, **more)
        pass_by()
        return result

    return wrapped


def _before_rename(function: Function, pass_by: Callable[[], None]) -> Function:
    """Of :meth:`Path.replace`: before a checkpoint gets its name."""

    @functools.wraps(function)
    def wrapped(path: Path, target: Path) -> Any:
        if _is_checkpoint(target):
            pass_by()
        return function(path, target)

    return wrapped


def _after_rename(function: Function, pass_by: Callable[[], None]) -> Function:
    """Of :meth:`Path.replace`: a checkpoint has its name, and the folder is not synced."""

    @functools.wraps(function)
    def wrapped(path: Path, target: Path) -> Any:
        result = function(path, target)
        if _is_checkpoint(target):
            pass_by()
        return result

    return wrapped


def _is_checkpoint(target: Path) -> bool:
    return target.stem.isdigit() and target.suffix == ".safetensors"


def _between_acks(function: Function, pass_by: Callable[[], None]) -> Function:
    """Of the transport's ``_ack``: the ones before are on the wire, this one and those after it are not."""

    @functools.wraps(function)
    def wrapped(transport: Any, token: Any) -> Any:
        channel = transport._channel
        if channel is not None and channel.raw.is_open:
            _send_now(channel.raw.connection, b"")
        pass_by()
        return function(transport, token)

    return wrapped


def _in_message(exchange: str) -> Wrap:
    """Of the publisher's ``_transmit``: a message to an exchange whose name ends like this is half on the wire."""

    def wrap(function: Function, pass_by: Callable[[], None]) -> Function:
        @functools.wraps(function)
        def wrapped(publisher: Any, channel: Any, publication: Any) -> Any:
            if not publication.exchange.endswith(exchange):
                return function(publisher, channel, publication)
            connection = channel.raw.connection
            output = connection._output_marshaled_frames

            def half(frames: list[bytes]) -> None:
                whole = b"".join(frames)
                # The last frame is the body's.
                sent = len(whole) - len(frames[-1]) // 2
                _send_now(connection, whole[:sent])
                pass_by()
                # Not yet: the rest goes the same way, so that what was sent stays whole.
                _send_now(connection, whole[sent:])

            connection._output_marshaled_frames = half
            try:
                return function(publisher, channel, publication)
            finally:
                connection._output_marshaled_frames = output

        return wrapped

    return wrap


def _send_now(connection: Any, more: bytes) -> None:
    """Put what pika has buffered, and ``more``, on the wire at once."""
    transport = connection._transport
    waiting = b"".join(transport._tx_buffers) + more
    transport._tx_buffers.clear()
    transport._tx_buffered_byte_count = 0
    transport._sock.setblocking(True)
    transport._sock.sendall(waiting)
    transport._sock.setblocking(False)


@dataclass(frozen=True, slots=True)
class Point:
    """A function of the product, and when around it the label is passed."""

    module: str
    name: str
    wrap: Wrap


AGGREGATOR: Mapping[str, Point] = {
    "after-claim": Point("aggregator.checkpoint", "CheckpointStore.claim", after),
    "before-fold": Point("aggregator.core.machine", "RoundMachine._fold", before),
    "after-fold": Point("aggregator.core.machine", "RoundMachine._fold", after),
    "after-close": Point("aggregator.core.machine", "RoundMachine._close", after),
    "before-fsync": Point("aggregator.checkpoint", "write_tensors", after),
    "after-fsync": Point("pathlib", "Path.replace", _before_rename),
    "after-rename": Point("pathlib", "Path.replace", _after_rename),
    "after-commit": Point("aggregator.checkpoint", "CheckpointStore.write", after),
    "between-acks": Point("broker.amqp.transport", "AmqpAggregatorTransport._ack", _between_acks),
    "before-history": Point("aggregator.history", "History.version", before),
    "after-history": Point("aggregator.history", "History.version", after),
    "before-broadcast": Point("aggregator.broadcasts", "Announcer.broadcast", before),
    "mid-broadcast": Point("broker.amqp.publisher", "Publisher._transmit", _in_message(".parameters")),
    "after-broadcast": Point("aggregator.broadcasts", "Announcer._done", before),
}

WORKER: Mapping[str, Point] = {
    "mid-training": Point("tests.support.tasks", "Counting.train", after),
    "after-id": Point("worker_client.outbox", "Outbox.next_id", after),
    "mid-upload": Point("broker.amqp.publisher", "Publisher._transmit", _in_message("fedmq.updates")),
    "before-note": Point("worker_client.outbox", "Outbox.confirm", before),
    "after-note": Point("worker_client.outbox", "Outbox.confirm", after),
}


def install(label: str, number: int) -> None:
    """Wrap what ``label`` names; the process dies at its passing number ``number``, counted from 1.

    Raises KeyError for a label that there is not, AttributeError if the product has no such function any more.
    """
    point = {**AGGREGATOR, **WORKER}[label]
    *path, last = point.name.split(".")
    owner: Any = importlib.import_module(point.module)
    for name in path:
        owner = getattr(owner, name)
    passed = 0

    def pass_by() -> None:
        nonlocal passed
        passed += 1
        if passed == number:
            os.write(2, f"{announcement(label)}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, last, point.wrap(getattr(owner, last), pass_by))


def main() -> None:
    """Install the point that the first argument names, and be ``fedmq``."""
    label, _, number = sys.argv[1].partition(":")
    install(label, int(number or 1))
    sys.argv[:2] = ["fedmq"]
    from fedmq.cli import main as fedmq  # noqa: PLC0415 (after the wrapping: it imports what is wrapped)

    fedmq()


if __name__ == "__main__":
    main()
