"""What goes over a link's connections, one after the other, for whoever watches."""

from __future__ import annotations

from broker.amqp.session import Session

__all__ = ["Traffic"]


class Traffic:
    """Counts the connections of one link, and bytes both ways. Written by the link's thread, read by any."""

    def __init__(self) -> None:
        self.connections = 0
        # In one value, so that a reader never sees the bytes of a connection twice or not at all.
        self._state: tuple[Session | None, int, int] = (None, 0, 0)
        self._most = (0, 0)

    def begin(self, session: Session) -> None:
        """A connection was made."""
        self.connections += 1
        _, sent, received = self._state
        self._state = (session, sent, received)

    def end(self) -> None:
        """It is over."""
        self._state = (None, *self.bytes)

    @property
    def is_up(self) -> bool:
        """Whether there is a connection now."""
        return self._state[0] is not None

    @property
    def is_blocked(self) -> bool:
        """Whether the broker takes nothing from it now."""
        session = self._state[0]
        return session is not None and session.is_blocked

    @property
    def reconnects(self) -> int:
        """Connections after the first."""
        return max(0, self.connections - 1)

    @property
    def bytes(self) -> tuple[int, int]:
        """Sent and received, over all connections."""
        session, sent, received = self._state
        more_sent, more_received = (0, 0) if session is None else session.traffic
        # At the moment at which a connection ends its own figures may be missing; what is counted never falls.
        self._most = max(self._most[0], sent + more_sent), max(self._most[1], received + more_received)
        return self._most
