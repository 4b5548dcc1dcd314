"""Which versions a worker knows, and which one it downloads."""

from __future__ import annotations

from broker.messages import ParametersHead, Rounds
from worker_client.core import events as ev

__all__ = ["Versions", "is_newer"]

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0


def is_newer(head: ParametersHead, than: ParametersHead | None) -> bool:
    """Whether ``head`` replaces ``than``: a higher epoch, then version, then attempt; or another plan for it.

    A lower epoch never does: its aggregator was replaced, and what it still says is void.
    """
    if than is None:
        return True
    mine, other = ((h.epoch, h.version, h.plan.attempt) for h in (head, than))
    return mine > other or (mine == other and head != than)


class Versions:
    """The newest version that was offered, the newest whose tensors are here, and the one on its way.

    A version whose digest is that of the tensors in hand is here, whatever its number: a plan told anew, another
    epoch, a round that was left out.

    A download is finished even if newer versions are offered meanwhile, so that a worker that is slower than they
    come still gets one. Except where nobody could use it: of an epoch that is over, or for a synchronous round that
    is closed. To replace it there costs a slow worker nothing, since updates for a closed round are rejected, and it
    leaves most time for the round that is open.

    Args:
        past_rounds: versions of closed rounds are of use as well: for evaluators.
    """

    def __init__(self, *, past_rounds: bool = False) -> None:
        self.newest: ParametersHead | None = None
        """The newest of which the worker was told, with the newest plan."""
        self.here: ParametersHead | None = None
        """The newest whose tensors are here."""
        self.coming: ParametersHead | None = None
        """The one that is being downloaded."""
        self._past_rounds = past_rounds
        self._failed: ParametersHead | None = None
        self._failures = 0
        self._is_pause = False

    @property
    def number(self) -> int:
        """Of the version that is here; -1 if there is none."""
        return self.here.version if self.here else -1

    @property
    def is_awaited(self) -> bool:
        """Whether a version is being downloaded, or will be again after a pause."""
        return self.coming is not None or self._is_pause

    def offer(self, head: ParametersHead) -> bool:
        """Take note of ``head``, whose tensors are elsewhere; whether it is newer than all before."""
        if not is_newer(head, self.newest):
            return False
        self.newest = head
        if self.here is not None and self.here.digest == head.digest:
            self.here = head
        return True

    def arrive(self, head: ParametersHead) -> bool:
        """Take note of ``head``, whose tensors are here; whether they are of use."""
        if self.coming is not None and self.coming.digest == head.digest:
            self.coming = None
        is_new = self.offer(head)
        if self.newest is None or head.epoch < self.newest.epoch or not (is_new or is_newer(head, self.here)):
            return False
        self.here = self.newest if self.newest.digest == head.digest else head
        return True

    def download(self) -> list[ev.Effect]:
        """Download the newest version, unless that is being done, or another is to be finished first."""
        head = self.newest
        if head is None or (self._is_pause and head == self._failed):
            return []
        if self.coming is not None and not self._replaces(head, self.coming):
            return []
        if head != self._failed:
            self._failures = 0
        self.coming, self._is_pause = head, False
        return [ev.Download(head)]

    def fail(self, head: ParametersHead) -> list[ev.Effect]:
        """The download of ``head`` failed. If there is nothing newer to download, a pause begins."""
        if self.coming is None or self.coming.digest != head.digest:
            return []
        failed, self.coming = self.coming, None
        if failed != self.newest:
            return []
        self._failures = self._failures + 1 if failed == self._failed else 1
        self._failed, self._is_pause = failed, True
        return [ev.DownloadLater(min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self._failures - 1, 10)))]

    def end_pause(self) -> None:
        """What failed may be tried again."""
        self._is_pause = False

    def _replaces(self, head: ParametersHead, coming: ParametersHead) -> bool:
        if head.digest == coming.digest:
            return False
        is_closed = head.plan.rounds is Rounds.SYNCHRONOUS and not self._past_rounds
        return head.epoch > coming.epoch or is_closed
