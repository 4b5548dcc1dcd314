"""The envelope: a fixed prefix, a small msgpack header, the data section. Normative page: ``FORMAT.md``.

Nothing here knows what a header means; ``messages.py`` does.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

import msgpack
import xxhash

from broker.errors import MessageTooLarge, UnknownFormat, WireError
from broker.wire.sealed import MAGIC, SEALED_VERSION, unsealed

__all__ = [
    "ALIGNMENT",
    "FORMAT_VERSION",
    "MAGIC",
    "MAX_ARRAY",
    "MAX_HEADER",
    "MAX_TENSORS",
    "aligned",
    "before_data",
    "frame",
    "header_check",
    "pack",
    "unpack",
]

FORMAT_VERSION = 1

#: magic, format version, check of the header, header length; little-endian, 12 bytes.
PREFIX = struct.Struct("<4sB3sI")

#: Where the data section starts, and each tensor in it: a cache line, and what vector instructions like.
ALIGNMENT = 64

#: Longest array in a header. msgpack reserves room for an array's announced length before it has seen the elements, at
#: each level of nesting, so this is also what bounds the memory that hostile bytes can claim.
MAX_ARRAY = 4096

#: Most tensors a model may have.
MAX_TENSORS = MAX_ARRAY

#: Largest header. A tensor takes 40 to 120 bytes of it (a 70-billion-parameter language model: 47 KB).
MAX_HEADER = 512 * 1024

#: Most maps in a header. The largest message has nine; 512 KiB have room for half a million empty ones, which would
#: take a tenth of a second and 40 MB.
MAX_MAPS = 64

_LIMITS: Mapping[str, Any] = {
    "raw": False,
    "use_list": False,
    "strict_map_key": True,
    "max_map_len": 256,
    "max_array_len": MAX_ARRAY,
    "max_str_len": 1024,
    "max_bin_len": 1024,
    "max_ext_len": 0,
}


def aligned(offset: int) -> int:
    """``offset`` rounded up to the next multiple of :data:`ALIGNMENT`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def pack(header: Mapping[str, Any], data: Iterable[memoryview] = ()) -> bytes:
    """One message; see :func:`frame`."""
    return b"".join(frame(header, data))


def frame(header: Mapping[str, Any], data: Iterable[memoryview] = ()) -> list[bytes | memoryview]:
    """One message in parts: prefix, ``header``, and at the next aligned offset ``data``, piece by piece.

    Raises :class:`MessageTooLarge` if the header is larger than :data:`MAX_HEADER`.
    """
    packed = msgpack.packb(header)
    if len(packed) > MAX_HEADER:
        raise MessageTooLarge(
            f"the description of this model takes {len(packed)} bytes; {MAX_HEADER} is the limit "
            f"(and {MAX_TENSORS} tensors): shorten the parameters' names or merge small ones"
        )
    prefix = PREFIX.pack(MAGIC, FORMAT_VERSION, header_check(packed), len(packed))
    pieces = list(data)
    end = PREFIX.size + len(packed)
    return [prefix, packed, bytes(aligned(end) - end if pieces else 0), *pieces]


def header_check(packed: bytes | memoryview) -> bytes:
    """The first three bytes of XXH3-64 over the header; the data section has a checksum of its own."""
    return xxhash.xxh3_64(packed).digest()[:3]


def unpack(body: bytes | memoryview) -> tuple[dict[str, Any], memoryview]:
    """The header of ``body`` and a view of its data section (empty if there is none); a seal is passed over.

    Raises :class:`UnknownFormat` for another format version, :class:`WireError` for anything else that does
    not follow the format. Allocates nothing in proportion to what the bytes announce.
    """
    view = unsealed(body)[1]
    check, end = _prefix(view)
    if check != header_check(view[PREFIX.size : end]):
        raise WireError("the header does not match its check: the message was damaged on its way")
    try:
        header = msgpack.unpackb(view[PREFIX.size : end], ext_hook=_no_extensions, object_pairs_hook=_Maps(), **_LIMITS)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        # UnicodeDecodeError and msgpack's own StackError, ExtraData and FormatError are ValueErrors.
        raise WireError(
            f"the header is not the msgpack that the format allows: {error or type(error).__name__}"
        ) from None
    if not isinstance(header, dict):
        raise WireError(f"the header is a {type(header).__name__}, not a map")
    return header, view[aligned(end) :] if view.nbytes > end else view[:0]


def before_data(view: memoryview) -> memoryview:
    """All of a message without a seal that stands before its data section. Raises as :func:`unpack`."""
    return view[: aligned(_prefix(view)[1])]


def _prefix(view: memoryview) -> tuple[bytes, int]:
    """The header's check, and where the header ends."""
    if view.nbytes < PREFIX.size:
        raise WireError(f"{view.nbytes} bytes are too few for a message")
    magic, version, check, header_length = PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise WireError(f"not a fedmq message: it begins with {bytes(magic)!r}, not {MAGIC!r}")
    if version == SEALED_VERSION:
        raise WireError("a seal before a seal")
    if version != FORMAT_VERSION:
        raise UnknownFormat(
            f"format version {version}; this release reads {FORMAT_VERSION}, and {SEALED_VERSION} for what is signed: "
            "upgrade one side"
        )
    end = PREFIX.size + header_length
    if header_length > MAX_HEADER or end > view.nbytes:
        raise WireError(f"a header of {header_length} bytes in a message of {view.nbytes}")
    return check, end


def _no_extensions(code: int, _data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


class _Maps:
    """Makes the maps of one header."""

    def __init__(self) -> None:
        self._left = MAX_MAPS

    def __call__(self, pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        """A map from its pairs. Built-in types only: this hook must never construct anything else."""
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"more than {MAX_MAPS} maps")
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a map names a key twice")
        if not all(isinstance(key, str) for key in result):
            raise ValueError("a map has a key that is not text")
        return result
