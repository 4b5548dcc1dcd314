"""The version that is here, and the one that can be downloaded."""

from __future__ import annotations

from broker.messages import Parameters, ParametersHead
from broker.transport import Delivery
from broker.wire import Shared
from worker_client.reading import Offer, under

__all__ = ["Shelf"]


class Shelf:
    """Holds one version's tensors: the newest that has arrived. Whoever works with an older one holds it himself."""

    def __init__(self) -> None:
        self._offer: Offer | None = None
        self._parameters: Parameters | None = None
        self._state = ""
        self._is_delta = True

    @property
    def shared(self) -> Shared | None:
        """What is here that the next version can be told by its difference from."""
        return Shared(self._parameters.tensors, self._state) if self._parameters is not None and self._state else None

    def put(self, parameters: Parameters, state: str) -> None:
        """A version is here now, and the name of its tensors, where versions are told by deltas."""
        self._parameters, self._state, self._is_delta = parameters, state, True

    def offer(self, offer: Offer) -> None:
        """A version can be downloaded; it takes the place of the one that was offered before."""
        self._offer = offer

    def refuse_delta(self) -> None:
        """Until another version is here, what is downloaded is whole."""
        self._is_delta = False

    def order(self) -> tuple[Delivery, range]:
        """What to fetch for the version on offer: its manifest, and which of its chunks."""
        if self._offer is None:
            raise RuntimeError("no version was offered")
        return self._offer.delivery, self._offer.part(self.shared if self._is_delta else None)

    def take(self, head: ParametersHead) -> Parameters:
        """The version to work with. Only the work holds it, besides this while there is no newer one."""
        if self._parameters is None:
            raise RuntimeError("no version has arrived")
        return under(head, self._parameters)
