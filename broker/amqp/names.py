"""Names are looked up on threads that nobody waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

__all__ = ["Lookups"]

P = ParamSpec("P")
T = TypeVar("T")


class Lookups(ThreadPoolExecutor):
    """An event loop's executor, which asyncio uses for ``getaddrinfo`` alone.

    A name server that is silent keeps a look-up for half a minute, and the standard executor's threads keep the
    process until they are through. So each look-up has a daemon thread, and the end waits for none.
    """

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start ``fn`` on a thread of its own."""
        future: Future[T] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the future
                future.set_exception(error)
            else:
                future.set_result(result)

        threading.Thread(target=work, name="fedmq-lookup", daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, **_how: Any) -> None:
        """Nothing is waited for."""
