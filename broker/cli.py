"""``python -m broker`` and ``fedmq broker``: look at a RabbitMQ before a run relies on it."""

from __future__ import annotations

from broker.console import errors, guard, parse_flags, set_up_logging, stop_on_signals

__all__ = ["errors", "guard", "parse_flags", "set_up_logging", "stop_on_signals"]
