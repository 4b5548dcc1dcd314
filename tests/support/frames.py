"""Where AMQP frames begin in a stream of bytes, so that a connection can be cut inside one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["BODY", "HEADER", "METHOD", "Cut", "Frames"]

METHOD, HEADER, BODY = 1, 2, 3
#: Type, channel, size of the payload; behind the payload one byte ends the frame.
HEAD = 7
#: With it a client begins: ``AMQP`` and the protocol's version.
GREETING = 8


@dataclass(eq=False)
class Cut:
    """An order to cut. ``happened`` is set when it was carried out."""

    offset: int
    kind: int | None
    direction: str
    least: int
    framed: bool = True
    happened: threading.Event = field(default_factory=threading.Event)

    def fits(self, kind: int, size: int) -> bool:
        """Whether a frame of this kind and payload is one to cut in."""
        return self.kind in (None, kind) and size >= self.least


class Frames:
    """Follows one direction of one connection."""

    def __init__(self, greets: bool) -> None:
        """``greets``: the direction begins with the client's greeting, which is no frame."""
        self._left = GREETING if greets else 0
        """Bytes until the next frame begins."""
        self._head = b""
        self._armed: tuple[Cut, int] | None = None
        """What will cut, and after how many further bytes."""
        self._counting: dict[Cut, int] = {}

    def feed(self, data: bytes, cuts: Sequence[Cut]) -> tuple[int, Cut] | None:
        """Take in what comes next. If one of ``cuts`` is due within: after how many bytes of it, and which."""
        if self._armed is not None and self._armed[0] not in cuts:
            self._armed = None
        ends = [self._framed(data, [cut for cut in cuts if cut.framed])]
        ends += [self._counted(data, cut) for cut in cuts if not cut.framed]
        due = [end for end in ends if end is not None]
        return min(due, key=lambda end: end[0]) if due else None

    def _counted(self, data: bytes, cut: Cut) -> tuple[int, Cut] | None:
        seen = self._counting.get(cut, 0)
        self._counting[cut] = seen + len(data)
        return (cut.offset - seen, cut) if seen + len(data) >= cut.offset else None

    def _framed(self, data: bytes, cuts: Sequence[Cut]) -> tuple[int, Cut] | None:
        position = 0
        due: tuple[int, Cut] | None = None
        while True:
            if self._armed is not None and due is None:
                cut, after = self._armed
                if after <= len(data) - position:
                    due = position + after, cut
                    self._armed = None
                else:
                    self._armed = cut, after - (len(data) - position)
            step = min(self._left, len(data) - position)
            self._left -= step
            position += step
            if position == len(data):
                return due
            taken = data[position : position + HEAD - len(self._head)]
            self._head += taken
            position += len(taken)
            if len(self._head) < HEAD:
                return due
            kind, size = self._head[0], int.from_bytes(self._head[3:7], "big")
            self._head, self._left = b"", size + 1
            if self._armed is None and due is None:
                fitting = next((cut for cut in cuts if cut.fits(kind, size)), None)
                if fitting is not None:
                    # The head has been seen; what of it lies in earlier data has gone through.
                    self._armed = fitting, max(0, min(fitting.offset, HEAD + size) - HEAD)
