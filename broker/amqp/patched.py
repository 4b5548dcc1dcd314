"""What pika lacks or keeps to itself."""

from __future__ import annotations

import ssl
import struct
from typing import Any

import pika
import pika.exceptions
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.adapters.utils.connection_workflow import AMQPConnector

__all__ = ["Connection", "drop_late"]

# pika reads its socket in pieces of 4 KiB and adds each to an immutable buffer until a frame (128 KiB) is
# whole, which copies everything sixteen times. Measured for 300 MiB in messages of 4 MiB: 77,000 reads and
# 0.6 to 0.7 s of processor time with 4 KiB, 1,400 reads and mostly 0.2 s with this. pika has no setting for it.
RECEIVE_BYTES = 256 * 1024

# pika gives each frame to the socket by itself, and with it a packet to the network and a wake-up to the broker: an
# acknowledgement has 21 bytes, and a commit may give a hundred. What waits together is sent in pieces of up to this.
SMALL_BYTES = 4096

LENGTH = struct.Struct(">I")
#: What pika's parser raises by itself, and ``struct``.
UNREADABLE = (struct.error, pika.exceptions.AMQPError)


def _guard_timestamps() -> None:
    """Let pika read headers with times that no calendar has, as None.

    It raises in the middle of its parser otherwise, which costs the connection; the message comes again and
    costs the next one, for ever.
    """
    decode_value = pika.data.decode_value

    def guarded(encoded: bytes, offset: int) -> tuple[Any, int]:
        try:
            value: tuple[Any, int] = decode_value(encoded, offset)
        except (OverflowError, OSError, ValueError):
            if encoded[offset : offset + 1] != b"T":
                raise
            return None, offset + 9
        return value

    pika.data.decode_value = guarded


def _guard_tables() -> None:
    """Let pika read headers that it cannot make sense of (NaN, nested a thousand deep) as none at all.

    As with times: whatever it raises costs the connection, and the message comes again.
    """
    decode_table = pika.data.decode_table

    def guarded(encoded: bytes, offset: int) -> tuple[dict[str, Any], int]:
        try:
            value: tuple[dict[str, Any], int] = decode_table(encoded, offset)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, OSError, *UNREADABLE):
            end = offset + LENGTH.size + LENGTH.unpack_from(encoded, offset)[0]
            if end > len(encoded):
                raise
            return {}, end
        return value

    pika.data.decode_table = guarded


def _guard_strings() -> None:
    """Let pika read a short string that is no UTF-8 as text with escapes, and not as bytes, which nobody expects."""
    decode_short_string = pika.data.decode_short_string

    def guarded(encoded: bytes, offset: int) -> tuple[str, int]:
        value, end = decode_short_string(encoded, offset)
        return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value, end

    pika.data.decode_short_string = guarded


def _guard_resets() -> None:
    """Let pika see that a connection was reset in the moment in which it was made.

    It insists on knowing the peer, and raises into the event loop if there is none any more; the attempt then ends
    only when its time is over.
    """
    done = AMQPConnector._on_tcp_connection_done  # noqa: SLF001

    def guarded(connector: Any, error: BaseException | None) -> None:
        try:
            done(connector, error)
        except ValueError as complaint:
            try:
                connector._sock.getpeername()  # noqa: SLF001
            except OSError as gone:
                # Not asked before: the reset may come between our question and pika's.
                done(connector, gone)
            else:
                raise complaint from None

    AMQPConnector._on_tcp_connection_done = guarded  # noqa: SLF001


def drop_late(channel: Any, tag: str) -> None:
    """Let pika drop what comes for consumer ``tag`` once it is being cancelled.

    It rejects it by itself, and a stream, which knows no rejecting, ends the whole connection for that.
    """
    channel._consumers_with_noack.add(tag)  # noqa: SLF001 - whatever it has is not rejected, and forgotten with it


_guard_timestamps()
_guard_tables()
_guard_strings()
_guard_resets()


class Connection(AsyncioConnection):  # type: ignore[misc]
    """pika's connection, with what it keeps to itself, and small frames sent together."""

    _transport: Any
    _past = (0, 0)

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received, also once it has ended."""
        sent, received = self._past
        return sent + int(self.bytes_sent), received + int(self.bytes_received)

    def _init_connection_state(self) -> None:
        """Pika begins to count anew when the connection has ended."""
        counted = self.traffic if hasattr(self, "bytes_received") else (0, 0)
        super()._init_connection_state()
        self._past = counted

    @property
    def tls(self) -> ssl.SSLSocket | None:
        """The socket, if it is encrypted."""
        sock = None if self._transport is None else self._transport._sock  # noqa: SLF001
        return sock if isinstance(sock, ssl.SSLSocket) else None

    def widen(self) -> None:
        """Read in larger pieces."""
        self._transport._MAX_RECV_BYTES = RECEIVE_BYTES  # noqa: SLF001 - see RECEIVE_BYTES
        self._transport._MAX_CONSUME_BYTES = 4 * RECEIVE_BYTES  # noqa: SLF001

    @property
    def buffered(self) -> int:
        """Bytes that wait to be sent."""
        return 0 if self._transport is None else int(self._transport.get_write_buffer_size())

    def _adapter_emit_data(self, data: bytes) -> None:
        waiting = self._transport._tx_buffers  # noqa: SLF001
        # Not to the first: a part of it may have been tried, and TLS insists on the same bytes then.
        if len(waiting) > 1 and len(waiting[-1]) + len(data) <= SMALL_BYTES:
            waiting[-1] += data
            self._transport._tx_buffered_byte_count += len(data)  # noqa: SLF001
        else:
            super()._adapter_emit_data(data)

    def abort(self) -> None:
        """Break the connection without a word."""
        if self._transport is not None:
            # Not the transport's own abort(): the connection insists on knowing a reason.
            self._terminate_stream(pika.exceptions.StreamLostError("cut"))
