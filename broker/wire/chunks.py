"""A message too large for one body: a manifest, and its data section in chunks.

The sender cuts chunks from its tensors at the moment at which each is sent, and the reader's tensors are views of
the chunks that came, so neither side holds a second copy of a model.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import overload

import zstandard

from broker.errors import BadSignature, MessageTooLarge, WireError
from broker.messages import ChunkHead, Manifest, Parameters, Update
from broker.wire.envelope import ALIGNMENT, MAX_ARRAY, aligned, pack
from broker.wire.messages import chunk_header, encode, manifest_of, read_chunk, section_of, with_tensors
from broker.wire.sealed import Sealing
from broker.wire.section import Section
from broker.wire.tensors import STRONG, checksum, matches

__all__ = ["CHUNK_OVERHEAD", "Bodies", "Chunks", "Sums", "encode_in_chunks", "join", "part_size", "section_from"]

#: What a chunk's body takes beyond its part of the section, at most.
CHUNK_OVERHEAD = 1024

#: A chunk that zstandard makes less than a twentieth smaller is not worth unpacking.
WORTHWHILE = 0.95
LEVEL = 1

#: Size and checksum of each chunk's part of a section.
Sums = tuple[tuple[int, str], ...]


class Bodies(Sequence[bytes]):
    """Bodies of chunks, each made when it is asked for; a subclass says how."""

    @abstractmethod
    def body(self, index: int) -> bytes:
        """The one at ``index``, which is at least 0 and less than how many there are."""

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        """As of a list."""
        places = range(len(self))[index]
        return self.body(places) if isinstance(places, int) else [self.body(place) for place in places]


class Chunks(Bodies):
    """The bodies of a message's chunks, cut from its section."""

    def __init__(
        self,
        section: Section,
        of: str,
        size: int,
        *,
        lossless: bool,
        first: int = 0,
        sums: Sums | None = None,
        strong: bool = False,
    ) -> None:
        """``first`` is the index that the first one has among all of the message's chunks; ``sums``: if known.

        ``strong``: the checksums are such as a signature can stand for.

        Raises :class:`MessageTooLarge` if there are more than a manifest can name.
        """
        if section.nbytes > MAX_ARRAY * size:
            raise MessageTooLarge(
                f"{section.nbytes} bytes are {math.ceil(section.nbytes / size)} chunks of {size}, and a manifest names "
                f"{MAX_ARRAY} at most: set broker.chunk_bytes to {least_chunk_bytes(section.nbytes)} or more"
            )
        self._section = section
        self._of = of
        self._size = size
        self._lossless = lossless
        self._first = first
        self._sums = sums
        self._strong = strong

    def __len__(self) -> int:
        """How many there are."""
        return math.ceil(self._section.nbytes / self._size)

    def body(self, index: int) -> bytes:
        """Envelope, header, and the chunk's part of the section."""
        views = self._views(index)
        head = ChunkHead(of=self._of, index=self._first + index)
        if self._lossless:
            plain = b"".join(views)
            packed = zstandard.ZstdCompressor(level=LEVEL).compress(plain)
            if len(packed) < WORTHWHILE * len(plain):
                return pack(chunk_header(head, is_packed=True), [memoryview(packed)])
            views = [memoryview(plain)]
        return pack(chunk_header(head, is_packed=False), views)

    def sums(self) -> Sums:
        """Size and checksum of each chunk's part of the section."""
        if self._sums is None or len(self._sums) != len(self):
            self._sums = self._made()
        return self._sums

    def _made(self) -> Sums:
        result = []
        for index in range(len(self)):
            views = self._views(index)
            result.append((sum(view.nbytes for view in views), checksum(views, strong=self._strong)))
        return tuple(result)

    def _views(self, index: int) -> list[memoryview]:
        start = index * self._size
        return list(self._section.views(start, min(start + self._size, self._section.nbytes)))


def encode_in_chunks(
    message: Update | Parameters,
    of: str,
    chunk_bytes: int,
    *,
    lossless: bool = False,
    sums: Sums | None = None,
    sealing: Sealing | None = None,
) -> tuple[bytes, Sequence[bytes]]:
    """``message`` as one body, or as a manifest and chunks if it is larger than ``chunk_bytes``.

    The chunks borrow the message's tensors, which nobody may write into until they are sent.

    Args:
        message: what to send.
        of: the message's id, which stands in its chunks.
        chunk_bytes: the largest body.
        lossless: pack each chunk with zstandard, if that makes it smaller.
        sums: what :meth:`Chunks.sums` said when the same message was cut to the same size before.
        sealing: signs the body.

    Raises as :func:`broker.wire.encode`, and :class:`MessageTooLarge` for more chunks than a manifest can name.
    """
    section = section_of(message)
    if section.nbytes + CHUNK_OVERHEAD <= chunk_bytes and len(body := encode(message, sealing)) <= chunk_bytes:
        return body, ()
    strong = sealing is not None
    chunks = Chunks(section, of, part_size(chunk_bytes), lossless=lossless, sums=sums, strong=strong)
    return encode(manifest_of(message, section.nbytes, chunks.sums()), sealing), chunks


def part_size(chunk_bytes: int) -> int:
    """How much of a section goes into a chunk whose body has at most ``chunk_bytes``."""
    return max((chunk_bytes - CHUNK_OVERHEAD) // ALIGNMENT, 1) * ALIGNMENT


def least_chunk_bytes(nbytes: int) -> int:
    """The smallest chunks in which a section of ``nbytes`` can travel."""
    return aligned(math.ceil(nbytes / MAX_ARRAY)) + CHUNK_OVERHEAD


def join(manifest: Manifest, of: str, chunks: Iterable[bytes]) -> Update | Parameters:
    """The message whose manifest and chunks, in order, these are. Its tensors are views of the chunks.

    Raises :class:`WireError` if a chunk is missing, damaged, of another message, or larger than announced.
    """
    return with_tensors(manifest, section_from(manifest.chunks, of, chunks))


def section_from(announced: Sequence[tuple[int, str]], of: str, chunks: Iterable[bytes], *, first: int = 0) -> Section:
    """The section whose parts have the ``announced`` sizes and checksums. Raises as :func:`join`."""
    parts = []
    for index, body in enumerate(chunks):
        if index >= len(announced):
            raise WireError(f"more chunks than the {len(announced)} that the manifest announces")
        try:
            parts.append(_part(body, of, first + index, *announced[index]))
        except WireError as error:
            # What is not as a checksum has it that nobody can forge was not made so by whoever has signed that.
            raise BadSignature(str(error)) if len(announced[index][1]) == STRONG else error from None
    if len(parts) < len(announced):
        raise WireError(f"{len(parts)} of {len(announced)} chunks")
    return Section(parts)


def _part(body: bytes, of: str, index: int, size: int, announced: str) -> memoryview:
    head, is_packed, data = read_chunk(body)
    if (head.of, head.index) != (of, index):
        raise WireError(f"chunk {head.index} of {head.of} in the place of chunk {index} of {of}")
    if is_packed:
        data = _unpacked(data, size)
    if data.nbytes != size:
        raise WireError(f"chunk {index} has {data.nbytes} bytes; the manifest says {size}")
    if not matches(data, announced):
        raise WireError(f"chunk {index} does not match its checksum: it was damaged on its way")
    return data


def _unpacked(data: memoryview, size: int) -> memoryview:
    try:
        # Before anything is allocated: what the frame says of its size is believed by the library.
        if zstandard.frame_content_size(data) != size:
            raise WireError(f"a packed chunk that does not say that it unpacks to {size} bytes")
        window = max(aligned(size), 1024)
        unpacker = zstandard.ZstdDecompressor(max_window_size=window)
        return memoryview(unpacker.decompress(data, max_output_size=size, allow_extra_data=False))
    except zstandard.ZstdError as error:
        raise WireError(f"a packed chunk cannot be unpacked: {error}") from None
