"""A signature before a message: who sent it, whatever stands between. The format is in ``FORMAT.md``.

What is signed is small, whatever the size of the tensors: everything before the data section, in which a SHA-256 of
the data stands. So a message has to be read once, as without a signature. Which keys there are, and whether a
signature is one, ``broker.signing`` knows; here are only the bytes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from broker.errors import WireError

__all__ = ["KEY_ID", "MAGIC", "SEALED_VERSION", "SEAL_BYTES", "Seal", "Sealing", "digest_of", "signed_text", "unsealed"]

MAGIC = b"FdMQ"

#: In the place of a format version, so that readers that know no signatures say what they lack.
SEALED_VERSION = 2

#: magic, format version, zeros, the key's name, the signature (Ed25519); then zeros.
_SEAL = struct.Struct("<4sB3s8s64s")
#: A multiple of the alignment of tensors, so that they stay where they are.
SEAL_BYTES = 128
#: Length in bytes of a key's name.
KEY_ID = 8

#: Makes the seal of a message from the digest of all that stands before its data.
Sealing = Callable[[bytes], bytes]


@dataclass(frozen=True, slots=True)
class Seal:
    """What stands before a signed message."""

    key: bytes
    """The key's name: the first eight bytes of the public key's SHA-256."""
    signature: bytes

    def __bytes__(self) -> bytes:
        """As it is sent."""
        return _SEAL.pack(MAGIC, SEALED_VERSION, bytes(3), self.key, self.signature).ljust(SEAL_BYTES, b"\0")


def unsealed(body: bytes | memoryview) -> tuple[Seal | None, memoryview]:
    """The seal of ``body``, None if it has none, and the message behind it. Raises :class:`WireError`.

    Whether the signature is one is not looked at.
    """
    view = memoryview(body)
    if view[:5] != MAGIC + bytes([SEALED_VERSION]):
        return None, view
    if view.nbytes < SEAL_BYTES:
        raise WireError(f"{view.nbytes} bytes are too few for a signed message")
    _, _, zeros, key, signature = _SEAL.unpack_from(view)
    if any(zeros) or any(view[_SEAL.size : SEAL_BYTES]):
        raise WireError("a seal with something else than zeros where they belong")
    return Seal(key, signature), view[SEAL_BYTES:]


def digest_of(before: Iterable[bytes | memoryview]) -> bytes:
    """SHA-256 over all that stands before a message's data."""
    digest = hashlib.sha256()
    for part in before:
        digest.update(part)
    return digest.digest()


def signed_text(purpose: str, run: str, digest: bytes) -> bytes:
    """What the signature is made of: what the message is good for, in which run, and its :func:`digest_of`."""
    return b"\0".join([b"fedmq signature 1", purpose.encode(), run.encode(), digest])
