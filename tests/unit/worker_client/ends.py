"""What a worker under test speaks to, and the worker itself in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from broker.memory import MemoryBroker
from broker.messages import Event, EventKind, Manifest, Parameters
from broker.settings import CHUNK_BYTES
from broker.transport import Delivery, Incoming, Outgoing, WorkerTransport
from broker.wire import decode, encode, encode_in_chunks, join
from tests.unit.worker_client.models import RUN, config, version_of
from worker_client.client import Summary, run_worker
from worker_client.config import WorkerConfig
from worker_client.task import Task
from worker_client.training import initial_parameters

LIMIT = 20.0


class Aggregator:
    """The other side, as far as a worker sees it: reads what comes and broadcasts what a test says."""

    def __init__(self, broker: MemoryBroker, task: Task, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes
        self.transport = broker.aggregator(RUN, prefetch=1000)
        self.model, self.tensors = initial_parameters(task)
        self.messages: list[Any] = []
        self.outgoing: list[Delivery] = []
        self._changed = threading.Condition()
        self.transport.open(self._receive)

    def _receive(self, item: Incoming) -> None:
        if isinstance(item, Delivery):
            message = decode(item.body)
            if isinstance(message, Manifest) and item.chunks is None:
                assert not item.lost
                self.transport.fetch(item)
                return
            if isinstance(message, Manifest):
                message = join(message, str(item.headers["message_id"]), item.chunks or ())
            with self._changed:
                self.messages.append(message)
                self.outgoing.append(item)
                self._changed.notify_all()
            if item.token is not None:
                self.transport.ack(item.token)

    def broadcast(self, version: int, **rest: Any) -> Parameters:
        parameters = version_of(self.model, self.tensors, version, **rest)
        self.transport.broadcast(self.outgoing_of(parameters)).result()
        return parameters

    def outgoing_of(self, parameters: Parameters) -> Outgoing:
        message_id = f"{RUN}/{parameters.epoch}/{parameters.version}"
        body, chunks = encode_in_chunks(parameters, message_id, self.chunk_bytes)
        headers = {"epoch": parameters.epoch, "version": parameters.version, "attempt": parameters.plan.attempt}
        headers |= {"chunks": len(chunks)} if chunks else {}
        return Outgoing(body=body, chunks=chunks, headers=headers, message_id=message_id)

    def notify(self, worker: str, **data: Any) -> None:
        event = Event(run=RUN, kind=EventKind.NOTICE, source="aggregator", time=1.0, data=data)
        self.transport.notify(worker, Outgoing(body=encode(event)))

    def of(self, wanted: type, /, **facts: Any) -> list[Any]:
        return [
            m
            for m in list(self.messages)
            if isinstance(m, wanted) and all(getattr(m, name) == value for name, value in facts.items())
        ]

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        with self._changed:
            assert self._changed.wait_for(condition, LIMIT), self.messages
        return condition()


@contextmanager
def running(
    broker: MemoryBroker | WorkerTransport,
    task: Task,
    stop: threading.Event | None = None,
    live: Callable[..., Summary] = run_worker,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    **settings: Any,
) -> Iterator[Future[Summary]]:
    """A worker in the background, stopped at the end of the block."""
    stop = stop or threading.Event()
    values: WorkerConfig = config(heartbeat_seconds=0.05, **settings)
    transport = broker.worker(RUN, values.name) if isinstance(broker, MemoryBroker) else broker
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(live, values, RUN, transport, task, chunk_bytes=chunk_bytes, stop=stop)
        try:
            yield future
        finally:
            stop.set()
