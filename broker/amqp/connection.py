"""A link: one connection to RabbitMQ on a thread of its own, made again for as long as it takes.

The thread does nothing but I/O, so heartbeats go on whatever the rest of the program does. Other threads hand
over work with :meth:`Link.call`, the only method besides ``start`` and ``stop`` that they may use.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from broker.amqp.refusals import FATAL
from broker.amqp.session import Channel, Session, parameters, quiet_pika
from broker.errors import BrokerError, BrokerUnreachable, ConnectionLost
from broker.settings import BrokerConfig

__all__ = ["Link"]

log = logging.getLogger("fedmq.broker")

#: Full jitter: a broker that comes back meets its workers one after the other, not all at once.
BACKOFF = wait_random_exponential(multiplier=0.2, max=10)

#: How often a link that cannot connect says so.
SAY_SECONDS = 30.0

Use = Callable[[Channel], Awaitable[None]]


class Link:
    """A connection with one working channel at a time.

    Args:
        config: addresses, heartbeat, timeouts.
        name: what the admin UI shows as the connection's name.
        use: sets up each new channel (declares, consumes, …). A :class:`BrokerError` from it ends the channel.
        down: called with the reason when a channel has ended for which ``use`` was called.
        failed: called when reconnecting is pointless; the link has stopped then.

    ``use``, ``down`` and ``failed`` are called on the link's thread.
    """

    def __init__(
        self,
        config: BrokerConfig,
        name: str,
        *,
        use: Use,
        down: Callable[[BrokerError], None],
        failed: Callable[[BrokerError], None],
    ) -> None:
        self.name = name
        #: Done as soon as the first channel is set up; fails if the link failed before.
        self.up: Future[None] = Future()
        #: Why the last attempt to connect failed.
        self.problem = ""
        self._parameters = parameters(config, name)
        self._use = use
        self._down = down
        self._failed = failed
        self._channel: Channel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._said_at = 0.0
        quiet_pika()

    def start(self) -> None:
        """Start connecting; returns at once."""
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(self._callback_failed)
        self._task = loop.create_task(self._main())
        self._loop = loop
        thread = threading.Thread(target=self._run, args=(loop, self._task), name=self.name, daemon=True)
        thread.start()
        self._thread = thread  # only now: a thread that has not started cannot be joined by whoever stops us

    def stop(self, timeout: float = 10.0) -> None:
        """Close channel and connection and end the thread. Harmless if it was never started."""
        if self._task is not None and not self._stopping:
            # Once: a second cancellation would interrupt the orderly end that the first one began.
            self._stopping = True
            self.call(self._task.cancel)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def call(self, function: Callable[..., object], *arguments: Any, after: float = 0.0) -> bool:
        """Run ``function`` on the link's thread, ``after`` seconds from now; False if the link has stopped."""
        if self._loop is None:
            return False
        try:
            if after:
                self._loop.call_soon_threadsafe(self._loop.call_later, after, function, *arguments)
            else:
                self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed
            return False
        return True

    def mark_up(self) -> None:
        """The link is as good as it can be for now."""
        if not self.up.done():
            self.up.set_result(None)

    def renew(self, reason: BrokerError) -> None:
        """End the present channel, so that the next one is set up again. On the link's thread only."""
        if self._channel is not None:
            self._channel.end(reason)

    def drop(self) -> None:
        """Break the connection, as a network would; it is made again. For tests."""
        self.call(self._cut)

    # --------------------------------------------------------------------------------- on the link's thread

    def _cut(self) -> None:
        if self._channel is not None:
            self._channel.session.cut()

    def _callback_failed(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # pika stumbles over itself where a connection is given up in the middle of being made; nobody needs that.
        level = logging.DEBUG if self._stopping else logging.ERROR
        log.log(level, "%s: %s", self.name, context["message"], exc_info=context.get("exception"))

    def _run(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
        try:
            loop.run_until_complete(asyncio.wait({task}))
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()
            if not self.up.done():
                self.up.set_exception(ConnectionLost("closed"))

    async def _main(self) -> None:
        retrying = AsyncRetrying(
            wait=BACKOFF,
            retry=retry_if_exception(lambda error: isinstance(error, BrokerError) and not isinstance(error, FATAL)),
            before_sleep=self._say,
            sleep=asyncio.sleep,
            reraise=True,
        )
        try:
            while True:
                session: Session = await retrying(self._connect)
                try:
                    reason = await self._serve(session)
                finally:
                    await session.close()
                log.warning("%s: %s; connecting again", self.name, reason)
                await asyncio.sleep(random.uniform(0, 1))  # noqa: S311 - jitter, not a secret
        except FATAL as error:
            self._fail(error)
        except Exception as error:  # a thread must not die without a word
            log.critical("%s: stopped by a fault in fedmq", self.name, exc_info=True)
            self._fail(BrokerError(f"{self.name} stopped by a fault in fedmq: {error!r}"))

    async def _connect(self) -> Session:
        problems = []
        for one in random.sample(self._parameters, len(self._parameters)):
            try:
                session = await Session.connect(one)
            except BrokerUnreachable as error:
                problems.append(str(error))
            else:
                log.info("%s: connected to %s", self.name, session.place.address)
                return session
        self.problem = "; ".join(problems)
        raise BrokerUnreachable(self.problem)

    async def _serve(self, session: Session) -> BrokerError:
        """Use the connection until it ends; the reason. The broker closes a channel to refuse one operation."""
        while True:
            reason = await self._one_channel(session)
            if isinstance(reason, FATAL):
                raise reason
            if session.closed.done():
                return session.closed.result()
            log.warning("%s: %s; setting up again", self.name, reason)
            await asyncio.sleep(random.uniform(0.2, 1))  # noqa: S311 - jitter, not a secret

    async def _one_channel(self, session: Session) -> BrokerError:
        reason: BrokerError = ConnectionLost("closed")
        try:
            self._channel = await session.channel()
        except BrokerError as error:
            return error
        try:
            try:
                await self._use(self._channel)
                self.mark_up()
                reason = await self._channel.ended()
            except BrokerError as error:
                reason = error
            finally:
                if not await self._channel.close():
                    session.cut()
        finally:
            self._channel = None
            self._down(reason)
        return reason

    def _say(self, state: RetryCallState) -> None:
        pause = state.next_action.sleep if state.next_action else 0.0
        now = time.monotonic()
        if state.attempt_number > 1 and now - self._said_at < SAY_SECONDS:
            return
        self._said_at = now
        log.warning("%s: no connection (%s); next attempt in %.1f s", self.name, self.problem, pause)

    def _fail(self, error: BrokerError) -> None:
        log.error("%s: %s", self.name, error)
        if not self.up.done():
            self.up.set_exception(error)
        self._failed(error)
