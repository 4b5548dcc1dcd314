"""Where a monitor's news come from: the events of a broker, and what the broker itself can be asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from broker.amqp.watch import AmqpWatch
from broker.settings import BrokerConfig
from broker.topology import Topology
from fedmq.monitoring.monitor import Monitor

__all__ = ["watching"]

TICK_SECONDS = 1.0


@contextmanager
def watching(config: BrokerConfig, run: str) -> Iterator[Monitor]:
    """A monitor of ``run`` that is fed until the block is left. Returns at once, connected or not.

    Raises :class:`ConfigError` if no run can have this name.
    """
    monitor = Monitor(run)
    watch = AmqpWatch(config, Topology(run))
    stop = threading.Event()

    def pass_time() -> None:
        while not stop.wait(TICK_SECONDS):
            monitor.tick()

    ticking = threading.Thread(target=pass_time, name="fedmq-watching", daemon=True)
    watch.open(monitor.take)
    ticking.start()
    try:
        yield monitor
    finally:
        stop.set()
        watch.close()
        ticking.join()
