"""Sending a message in chunks: many chunks on their way at once, each confirmed, and the manifest after the last."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import pika

from broker.amqp.publisher import Publisher
from broker.amqp.session import Channel
from broker.errors import BrokerError, BrokerUnreachable, ConnectionLost, MessageTooLarge
from broker.progress import bar
from broker.transport import Outgoing

__all__ = ["Route", "Tail", "Uploader", "chunk_id", "offsets_text", "runs_of"]

log = logging.getLogger("fedmq.broker")

#: Chunks on their way; enough for the connection to be busy while the broker writes the first to its disk.
WINDOW = 8
#: A mark that was put into a stream comes back at once.
MARK_SECONDS = 2.0
FIND_SECONDS = 30.0


def chunk_id(message_id: str, index: int) -> str:
    """A chunk's ``message_id``."""
    return f"{message_id}#{index}"


@dataclass(frozen=True, slots=True)
class Route:
    """Where chunks go, and where their manifest."""

    chunks: tuple[str, str]
    """Exchange and routing key."""
    manifest: tuple[str, str]
    kind: str


@dataclass(slots=True)
class _Upload:
    # Not the message: it borrows a model's worth of memory.
    message_id: str
    stored: dict[int, int] = field(default_factory=dict)
    """Chunks that were confirmed, and the offset of each if they are in a stream."""


class Tail:
    """The offset of the next message in a stream to which nobody else writes.

    RabbitMQ tells readers where a message stands, but not whoever writes it. So one small message, the mark, is
    written and read back. For each version anew: counting on from there goes wrong, since RabbitMQ writes notes of its
    own into a stream, one with each segment.
    """

    def __init__(self, publisher: Publisher, exchange: str, stream: str) -> None:
        self._publisher = publisher
        self._exchange, self._stream = exchange, stream

    def find(self) -> int:
        """The next offset. Raises :class:`BrokerError`."""
        try:
            return self._publisher.link.submit(self._mark).result(FIND_SECONDS) + 1
        except (TimeoutError, CancelledError):
            raise ConnectionLost(f"the end of stream {self._stream} was not found in time") from None

    async def _mark(self, channel: Channel) -> int:
        probe = await channel.session.channel()
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def on_message(_method: object, properties: pika.BasicProperties, _body: bytes) -> None:
            offset = (properties.headers or {}).get("x-stream-offset")
            if isinstance(offset, int) and not found.done():
                found.set_result(offset)

        try:
            await probe.consume(self._stream, on_message, prefetch=1, arguments={"x-stream-offset": "next"})
            for _ in range(5):
                probe.publish(
                    self._exchange, "", b"", pika.BasicProperties(delivery_mode=2, type="mark", app_id="fedmq")
                )
                if await probe.wait(found, MARK_SECONDS):
                    return found.result()
        finally:
            await probe.close()
        raise ConnectionLost(f"stream {self._stream} does not give back what is written to it")


class Uploader:
    """Sends messages in chunks, one after the other, on a thread of its own: cutting and packing chunks takes time."""

    def __init__(self, publisher: Publisher, route: Route, *, tail: Tail | None = None) -> None:
        """With ``tail``, the chunks go into a stream, and the manifest says where they stand in it."""
        self._publisher = publisher
        self._route = route
        self._tail = tail
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._upload: _Upload | None = None
        self._is_closed = False

    def send(self, message: Outgoing) -> Future[None]:
        """Send ``message``; the future is done once the broker has confirmed it whole.

        It fails as :meth:`Publisher.publish` does. Sent again, it goes on with the chunks that are missing.
        """
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        self._start(lambda: self._send(message, future), future)
        return future

    def prepare(self, message: Outgoing) -> None:
        """Send only the chunks of ``message``, in case it is sent soon."""
        self._start(lambda: self._prepare(message))

    def forget(self) -> None:
        """What was confirmed may be gone: the next message is sent from its beginning."""
        self._upload = None

    def close(self) -> None:
        """Stop; what is on its way fails as soon as the publisher is stopped."""
        self._is_closed = True
        self._thread.shutdown(wait=False, cancel_futures=False)

    def _start(self, deed: Callable[[], None], future: Future[None] | None = None) -> None:
        try:
            self._thread.submit(self._guarded, deed, future)
        except RuntimeError:  # it was closed
            if future is not None:
                future.set_exception(BrokerUnreachable("this transport was closed before the message was sent"))

    def _guarded(self, deed: Callable[[], None], future: Future[None] | None) -> None:
        try:
            deed()
        except Exception as error:  # else whoever waits for the future would wait for ever, and nobody know why
            log.exception("a message could not be sent in chunks")
            if future is not None:
                failure = BrokerError(f"a message could not be sent in chunks: {type(error).__name__}: {error}")
                failure.__cause__ = error
                future.set_exception(failure)

    def _prepare(self, message: Outgoing) -> None:
        try:
            self._send_chunks(message)
        except BrokerError:
            return  # whoever sends it will meet it

    def _send(self, message: Outgoing, future: Future[None]) -> None:
        try:
            upload = self._send_chunks(message)
        except BrokerError as error:
            if isinstance(error, MessageTooLarge):
                self._upload = None  # it is cut anew, and what was confirmed is of another cut
            future.set_exception(error)
            return
        headers = dict(message.headers)
        if self._tail is not None:
            headers["offsets"] = offsets_text(upload.stored)
        manifest = Outgoing(body=message.body, message_id=message.message_id, headers=headers)
        sent = self._publisher.publish(*self._route.manifest, manifest, kind=self._route.kind)
        sent.add_done_callback(lambda done: _hand_on(done, future))

    def _send_chunks(self, message: Outgoing) -> _Upload:
        upload = self._upload
        if upload is None or upload.message_id != message.message_id:
            upload = self._upload = _Upload(message.message_id)
        missing = [index for index in range(len(message.chunks)) if index not in upload.stored]
        if missing:
            first = 0 if self._tail is None else self._tail.find()
            with bar(f"uploading {message.message_id}", total=len(missing), unit="chunks", is_deep=True) as step:
                attempt = _Attempt(self._publisher, self._route, message, lambda: self._is_closed, step)
                attempt.run(missing, upload.stored, first)
        return upload


class _Attempt:
    """One attempt to send the chunks that are missing."""

    def __init__(
        self,
        publisher: Publisher,
        route: Route,
        message: Outgoing,
        is_closed: Callable[[], bool],
        step: Callable[[], object],
    ) -> None:
        """``step`` is told of each chunk that is confirmed."""
        self._publisher = publisher
        self._route = route
        self._message = message
        self._is_closed = is_closed
        self._step = step
        self._room = threading.Semaphore(WINDOW)
        self._errors: dict[int, BaseException] = {}
        self._done: set[int] = set()

    def run(self, missing: list[int], stored: dict[int, int], first: int) -> None:
        """Send ``missing``, and note in ``stored`` what was confirmed. Raises the first :class:`BrokerError`.

        In a stream, only what was confirmed before the first failure counts: of the rest nobody knows where it is.
        """
        for number, index in enumerate(missing):
            self._room.acquire()
            if self._errors or self._is_closed():
                self._room.release()
                break
            headers = {**self._message.headers, "chunk": index, "chunks": len(self._message.chunks)}
            body = Outgoing(
                body=self._message.chunks[index], message_id=chunk_id(self._message.message_id, index), headers=headers
            )
            sent = self._publisher.publish(*self._route.chunks, body, kind="chunk")
            sent.add_done_callback(partial(self._settled, number))
        for _ in range(WINDOW):
            self._room.acquire()
        failed = min(self._errors, default=len(missing))
        stored.update({index: first + n for n, index in enumerate(missing) if n in self._done and n < failed})
        if self._errors:
            raise self._errors[failed]
        if len(self._done) < len(missing):
            raise BrokerUnreachable("this transport was closed before the message was sent")

    def _settled(self, number: int, done: Future[None]) -> None:
        error = done.exception()
        if error is None:
            self._done.add(number)
            self._step()
        else:
            self._errors[number] = error
        self._room.release()


def offsets_text(stored: dict[int, int]) -> str:
    """Where chunks 0, 1, … stand in a stream, as runs ``<offset>+<count>``, separated by spaces."""
    runs: list[tuple[int, int]] = []
    for index in sorted(stored):
        start, count = runs[-1] if runs else (0, 0)
        if runs and stored[index] == start + count:
            runs[-1] = start, count + 1
        else:
            runs.append((stored[index], 1))
    return " ".join(f"{start}+{count}" for start, count in runs)


def runs_of(text: object) -> list[tuple[int, int]]:
    """The runs in ``text``; the empty list if it is none that :func:`offsets_text` makes."""
    runs = []
    for part in str(text).split():
        start, _, count = part.partition("+")
        if not (start.isdecimal() and count.isdecimal()) or len(part) > 40:
            return []
        runs.append((int(start), int(count)))
    return runs


def _hand_on(done: Future[None], future: Future[None]) -> None:
    error = done.exception()
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
