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
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from broker.amqp.login import Login
from broker.amqp.names import Lookups
from broker.amqp.refusals import FATAL
from broker.amqp.renewal import keep_token
from broker.amqp.session import Channel, Session, quiet_pika
from broker.amqp.traffic import Traffic
from broker.errors import AccessRefused, BrokerError, BrokerUnreachable, ConnectionLost, Untrusted
from broker.seldom import Seldom
from broker.settings import BrokerConfig

__all__ = ["Link", "pause"]

log = logging.getLogger("fedmq.broker")

FIRST_PAUSE = 0.2
LONGEST_PAUSE = 10.0
#: Full jitter: a broker that comes back meets its workers one after the other, not all at once.
BACKOFF = wait_random_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE)

#: What has held for so long was good, and when it ends the pauses begin with the shortest again.
STEADY_SECONDS = 5.0

Use = Callable[[Channel], Awaitable[None]]
T = TypeVar("T")


def pause(attempt: int) -> float:
    """How long to wait after failure number ``attempt`` (from 1) of something that is not a connection."""
    return random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(attempt, 10)))  # noqa: S311 - jitter


class Link:
    """A connection with one working channel at a time.

    Args:
        config: addresses, heartbeat, timeouts.
        name: what the admin UI shows as the connection's name.
        use: sets up each new channel (declares, consumes, …). A :class:`BrokerError` from it ends the channel.
        down: called with the reason when a channel has ended for which ``use`` was called.
        failed: called when reconnecting is pointless; the link has stopped then. Nothing of it is logged here.
        seldom: keeps several links from saying the same.

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
        seldom: Seldom | None = None,
    ) -> None:
        self.name = name
        #: Done as soon as the first channel is set up; fails if the link failed before.
        self.up: Future[None] = Future()
        #: Called on the link's thread each time that a connection was made.
        self.connected: Callable[[], object] = lambda: None
        #: The broker's account that it speaks as, from the first connection on.
        self.account = ""
        #: Why the last attempt to connect failed.
        self.problem = ""
        self.traffic = Traffic()
        self._login = Login(config, name)
        self._config = config
        self._use = use
        self._down = down
        self._failed = failed
        self._channel: Channel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._is_woken = False
        self._seldom = seldom or Seldom()
        self._is_quiet = False
        self._hurried: asyncio.Future[None] | None = None
        self._is_unreachable = False
        quiet_pika()

    def start(self) -> None:
        """Start connecting; returns at once."""
        loop = asyncio.new_event_loop()
        loop.set_default_executor(Lookups())
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
        if self._loop is None or self._loop.is_closed():
            return False
        try:
            if after:
                self._loop.call_soon_threadsafe(self._loop.call_later, after, function, *arguments)
                return True
            self._calls.append((function, arguments))
            # Waking the thread costs a write to a pipe: once for all that wait. The mark goes up after the call is in
            # the queue and down before the queue is read, so that none stays behind.
            if not self._is_woken:
                self._is_woken = True
                self._loop.call_soon_threadsafe(self._do_calls)
        except RuntimeError:  # the loop is closed
            return False
        return True

    def submit(self, function: Callable[[Channel], Coroutine[Any, Any, T]]) -> Future[T]:
        """Run ``function`` with the present channel on the link's thread.

        The future fails with what it raises, and with :class:`ConnectionLost` if there is no channel.
        """
        if self._loop is None or self._loop.is_closed():
            future: Future[T] = Future()
            future.set_exception(ConnectionLost("closed"))
            return future
        return asyncio.run_coroutine_threadsafe(self._with_channel(function), self._loop)

    def mark_up(self) -> None:
        """The link is as good as it can be for now."""
        if not self.up.done():
            self.up.set_result(None)

    def renew(self, reason: BrokerError) -> None:
        """End the present channel, so that the next one is set up again. On the link's thread only."""
        if self._channel is not None:
            self._channel.end(reason)

    def hurry(self) -> None:
        """Try to connect now, if the broker could not be reached and the link waits to try again: it is there."""
        self.call(self._end_wait)

    def drop(self) -> None:
        """Break the connection, as a network would; it is made again. For tests."""
        self.call(self._cut)

    # --------------------------------------------------------------------------------- on the link's thread

    def _do_calls(self) -> None:
        self._is_woken = False
        try:
            for _ in range(len(self._calls)):  # those that come meanwhile have woken the thread again
                function, arguments = self._calls.popleft()
                function(*arguments)
        finally:
            if self._calls:  # one that fails, which the loop reports, does not take the others with it
                asyncio.get_running_loop().call_soon(self._do_calls)

    async def _with_channel(self, function: Callable[[Channel], Coroutine[Any, Any, T]]) -> T:
        if self._channel is None:
            raise ConnectionLost("no connection")
        return await function(self._channel)

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
        finally:
            loop.close()
            if not self.up.done():
                self.up.set_exception(ConnectionLost("closed"))

    async def _main(self) -> None:
        try:
            while True:
                await self._again_and_again(self._live, sleep=self._wait)
                await asyncio.sleep(random.uniform(0, 1))  # noqa: S311 - jitter, not a secret
        except FATAL as error:
            self._fail(error)
        except Exception as error:  # a thread must not die without a word
            log.critical("%s: stopped by a fault in fedmq", self.name, exc_info=True)
            self._fail(BrokerError(f"{self.name} stopped by a fault in fedmq: {error!r}"))

    async def _wait(self, seconds: float) -> None:
        if not self._is_unreachable:
            # Two links whose connections break at once must not drive each other on.
            await asyncio.sleep(seconds)
            return
        self._hurried = asyncio.get_running_loop().create_future()
        # Not wait_for: Python 3.11's forgets a cancellation that comes at the moment at which it ends.
        await asyncio.wait({self._hurried}, timeout=seconds)

    def _end_wait(self) -> None:
        if self._hurried is not None and not self._hurried.done():
            self._hurried.set_result(None)

    async def _again_and_again(
        self,
        function: Callable[..., Awaitable[None]],
        *arguments: object,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Call ``function`` until it returns; after each error that waiting may cure with a longer pause."""
        retrying = AsyncRetrying(
            wait=BACKOFF,
            retry=retry_if_exception(lambda error: isinstance(error, BrokerError) and not isinstance(error, FATAL)),
            before_sleep=self._say,
            sleep=sleep,
            reraise=True,
        )
        await retrying(function, *arguments)

    async def _live(self) -> None:
        """One connection from its beginning to its end, which is raised unless it has held for a while."""
        session = await self._connect()
        began = time.monotonic()
        self.traffic.begin(session)
        renewing = None
        if self._config.token_file is not None:
            renewing = asyncio.ensure_future(keep_token(session, self._config))
        try:
            reason = await self._serve(session)
        finally:
            if renewing is not None:
                renewing.cancel()
            self.traffic.end()
            closing = asyncio.ensure_future(session.close())
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError:
                await closing  # whoever stops the link in the middle of this would leave an open socket behind
                raise
        if self._seldom.may("lost"):
            self._is_quiet = False
            log.warning("%s: %s; connecting again", self.name, reason)
        if time.monotonic() - began < STEADY_SECONDS:
            raise reason

    async def _connect(self) -> Session:
        problems: list[str] = []  # not the errors, whose tracebacks hold their connections
        untrusted = 0
        addresses = self._login.parameters()
        for one in random.sample(addresses, len(addresses)):
            try:
                session = await Session.connect(one)
            except AccessRefused as error:
                verdict = self._login.refused(error)
                if verdict is error:
                    raise
                problems.append(str(verdict))
            except (BrokerUnreachable, Untrusted) as error:
                problems.append(str(error))
                untrusted += isinstance(error, Untrusted)
            else:
                self._login.accepted()
                if not self._is_quiet:
                    log.info("%s: connected to %s", self.name, session.place.address)
                self._is_quiet = True
                self.account = session.place.user
                self.connected()
                return session
        self.problem = "; ".join(problems)
        if not self.account and untrusted == len(problems):
            raise Untrusted(self.problem)
        raise BrokerUnreachable(self.problem)

    async def _serve(self, session: Session) -> BrokerError:
        """Use the connection until it ends; the reason. The broker closes a channel to refuse one operation."""
        while not session.closed.done():
            await self._again_and_again(self._one_life, session)
            await asyncio.sleep(random.uniform(0, 1))  # noqa: S311 - jitter, not a secret
        return session.closed.result()

    async def _one_life(self, session: Session) -> None:
        """One channel to its end. Raises the reason if it is fatal, or if the channel did not hold for long."""
        began = time.monotonic()
        reason = await self._one_channel(session)
        if isinstance(reason, FATAL):
            raise reason
        if session.closed.done():
            return
        if self._seldom.may(f"channel: {type(reason).__name__}"):
            log.warning("%s: %s; setting up again", self.name, reason)
        if time.monotonic() - began < STEADY_SECONDS:
            raise reason

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
        error = state.outcome.exception() if state.outcome else None
        self._is_unreachable = isinstance(error, BrokerUnreachable)
        if self._is_unreachable and self._seldom.may("no connection"):
            self._is_quiet = False
            wait = state.next_action.sleep if state.next_action else 0.0
            log.warning("%s: no connection (%s); next attempt in %.1f s", self.name, self.problem, wait)

    def _fail(self, error: BrokerError) -> None:
        if not self.up.done():
            self.up.set_exception(error)
        self._failed(error)
