"""Messages as bytes; the format is ``FORMAT.md`` beside this file. No I/O, no clock, no randomness."""

from broker.wire.messages import Message, decode, encode

__all__ = ["Message", "decode", "encode"]
