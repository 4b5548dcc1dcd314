"""Messages in chunks: cut from the tensors as they lie, joined without a copy, and everything else refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import MessageTooLarge, WireError
from broker.messages import Array, Manifest, Update, whole
from broker.wire import decode, encode, encode_in_chunks, encode_parts, join
from broker.wire.envelope import frame
from tests.support.builders import update_of

LIMIT = 4096


def tensors_of(sizes: Sequence[int]) -> dict[str, Array]:
    kinds = (np.float32, np.float64, np.int64, np.float16)
    return {
        f"t{n}": np.random.default_rng(n).integers(-100, 100, size).astype(kinds[n % len(kinds)])
        for n, size in enumerate(sizes)
    }


def cut(update: Update, *, lossless: bool = False) -> tuple[Manifest, list[bytes]]:
    body, chunks = encode_in_chunks(update, str(update.id), LIMIT, lossless=lossless)
    manifest = decode(body)
    assert isinstance(manifest, Manifest)
    return manifest, list(chunks)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=6), st.booleans())
def test_what_is_cut_and_joined_is_what_it_was(sizes: list[int], lossless: bool) -> None:
    update = update_of(tensors_of(sizes))
    body, chunks = encode_in_chunks(update, str(update.id), LIMIT, lossless=lossless)
    message = decode(body)
    if chunks:
        assert isinstance(message, Manifest)
        assert all(len(chunk) <= LIMIT for chunk in chunks)
        message = join(message, str(update.id), list(chunks))
    else:
        assert body == encode(update)
    assert isinstance(message, Update)
    assert message.id == update.id
    assert b"".join(encode_parts(message)) == encode(update)
    for name, array in update.tensors.items():
        assert whole(message.tensors[name]).tobytes() == whole(array).tobytes()
        assert message.tensors[name].shape == array.shape


def test_tensors_are_views_of_the_chunks() -> None:
    update = update_of(tensors_of([200, 3000]))
    manifest, chunks = cut(update)
    joined = join(manifest, str(update.id), chunks)
    first = joined.tensors["t0"]
    assert isinstance(first, np.ndarray)
    assert np.shares_memory(first, np.frombuffer(chunks[0], np.uint8))
    assert not first.flags.writeable


def test_a_chunk_is_cut_when_it_is_asked_for() -> None:
    tensors = tensors_of([3000])
    update = update_of(tensors)
    _, chunks = encode_in_chunks(update, str(update.id), LIMIT)
    before = chunks[0]
    tensors["t0"][0] += 1
    assert chunks[0] != before


def test_packing_makes_repetitive_chunks_smaller_and_leaves_noise_alone() -> None:
    zeros = update_of({"w": np.zeros(5000, np.float32)})
    noise = update_of({"w": np.frombuffer(np.random.default_rng(0).bytes(20_000), np.float32)})
    for update, is_smaller in ((zeros, True), (noise, False)):
        plain, packed = cut(update)[1], cut(update, lossless=True)[1]
        assert (sum(map(len, packed)) < sum(map(len, plain)) / 10) is is_smaller


def test_more_chunks_than_a_manifest_can_name_are_refused_by_the_sender() -> None:
    most = 4096
    update = update_of({"w": np.zeros(64 * most // 4 + 1, np.float32)})
    with pytest.raises(MessageTooLarge, match="are 4097 chunks of 64") as refused:
        encode_in_chunks(update, str(update.id), 64)
    advice = re.search(r"set broker.chunk_bytes to (\d+) or more", str(refused.value))
    assert advice is not None
    body, chunks = encode_in_chunks(update, str(update.id), int(advice[1]))
    manifest = decode(body)
    assert isinstance(manifest, Manifest)
    assert len(manifest.chunks) == len(chunks) <= most


@pytest.fixture
def sound() -> tuple[Manifest, list[bytes]]:
    return cut(update_of(tensors_of([5000])))


ID = "w0/i/0"


def test_a_missing_a_surplus_and_a_swapped_chunk_are_noticed(sound: tuple[Manifest, list[bytes]]) -> None:
    manifest, chunks = sound
    swapped = [chunks[1], chunks[0], *chunks[2:]]
    for wrong in (chunks[:-1], [*chunks, chunks[0]], swapped, [chunks[0], *chunks], []):
        with pytest.raises(WireError):
            join(manifest, ID, wrong)


def test_a_chunk_of_another_update_is_noticed(sound: tuple[Manifest, list[bytes]]) -> None:
    manifest, chunks = sound
    other = cut(update_of(tensors_of([5000]), seq=1))[1]
    with pytest.raises(WireError, match="of w0/i/1 in the place"):
        join(manifest, ID, [other[0], *chunks[1:]])


@given(st.data())
def test_no_damage_goes_unnoticed(data: st.DataObject) -> None:
    manifest, chunks = cut(update_of(tensors_of([5000])))
    index = data.draw(st.integers(0, len(chunks) - 1))
    body = bytearray(chunks[index])
    place = data.draw(st.integers(0, len(body) - 1))
    body[place] ^= data.draw(st.integers(1, 255))
    chunks[index] = bytes(body)
    # The padding between header and data is the one thing that nothing depends on.
    try:
        joined = join(manifest, ID, chunks)
    except WireError:
        return
    assert whole(joined.tensors["t0"]).tobytes() == tensors_of([5000])["t0"].tobytes()


@given(st.binary(max_size=200))
def test_whatever_the_bytes_only_a_wire_error_comes(noise: bytes) -> None:
    manifest, chunks = cut(update_of(tensors_of([5000])))
    with pytest.raises(WireError):
        join(manifest, ID, [noise, *chunks[1:]])


def packed_chunk(payload: bytes) -> bytes:
    header = {"type": "chunk", "of": ID, "index": 0, "zstd": True}
    return b"".join(frame(header, [memoryview(payload)]))


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(zstandard.ZstdCompressor().compress(bytes(2**30)), id="unpacks to a gigabyte"),
        pytest.param(
            zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**20)), id="does not say to how much"
        ),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x28\xb5\x2f\xfd" + bytes(20), id="no frame"),
        pytest.param(zstandard.ZstdCompressor().compress(bytes(3008)) + b"more", id="something behind it"),
    ],
)
def test_a_packed_chunk_that_is_not_what_the_manifest_says_is_refused(payload: bytes) -> None:
    manifest, chunks = cut(update_of({"w": np.zeros(5000, np.float32)}))
    with pytest.raises(WireError):
        join(manifest, ID, [packed_chunk(payload), *chunks[1:]])


def test_chunks_that_end_in_the_middle_of_an_element_are_refused() -> None:
    manifest, _ = cut(update_of({"w": np.zeros(2000, np.float32)}))
    parts = [bytes(3001), bytes(4999)]
    chunks = [
        b"".join(frame({"type": "chunk", "of": ID, "index": index, "zstd": False}, [memoryview(part)]))
        for index, part in enumerate(parts)
    ]
    sums = tuple((len(part), xxhash.xxh3_128_hexdigest(part)) for part in parts)
    with pytest.raises(WireError, match="middle of an element"):
        join(replace(manifest, chunks=sums), ID, chunks)
