"""Which versions a training worker evaluates on the data that it holds out."""

from __future__ import annotations

from broker.messages import ParametersHead

__all__ = ["Checks"]


class Checks:
    """One version in each stretch of ``evaluate_every`` versions, and the run's last one.

    The first of a stretch that the worker comes to, which need not be the stretch's first: a slow worker does not see
    every version.

    Args:
        can: whether the worker holds data out.
    """

    def __init__(self, *, can: bool) -> None:
        self._can = can
        self._newest = -1

    def is_due(self, head: ParametersHead) -> bool:
        """Whether this version is to be evaluated."""
        every = head.plan.work.evaluate_every
        if not self._can or not every or head.version <= self._newest:
            return False
        return head.plan.done or self._newest < 0 or head.version // every > self._newest // every

    def begin(self, head: ParametersHead) -> None:
        """It is being evaluated."""
        self._newest = head.version

    def stop(self) -> None:
        """No more of that: the worker is in a hurry to leave, or cannot get the version."""
        self._can = False
