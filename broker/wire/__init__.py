"""Messages as bytes; the format is ``FORMAT.md`` beside this file. No I/O, no clock, no randomness."""

from broker.wire.chunks import CHUNK_OVERHEAD, Chunks, Sums, encode_in_chunks, join
from broker.wire.deltas import Shared, delta_range, follow, told_by_delta
from broker.wire.encoded import compressed
from broker.wire.messages import Message, decode, encode, encode_parts, order_in
from broker.wire.sealed import Sealing

__all__ = [
    "CHUNK_OVERHEAD",
    "Chunks",
    "Message",
    "Sealing",
    "Shared",
    "Sums",
    "compressed",
    "decode",
    "delta_range",
    "encode",
    "encode_in_chunks",
    "encode_parts",
    "follow",
    "join",
    "order_in",
    "told_by_delta",
]
