"""Messages as bytes; the format is ``FORMAT.md`` beside this file. No I/O, no clock, no randomness."""

from broker.wire.chunks import CHUNK_OVERHEAD, encode_in_chunks, join
from broker.wire.encoded import compressed
from broker.wire.messages import Message, decode, encode, encode_parts

__all__ = ["CHUNK_OVERHEAD", "Message", "compressed", "decode", "encode", "encode_in_chunks", "encode_parts", "join"]
