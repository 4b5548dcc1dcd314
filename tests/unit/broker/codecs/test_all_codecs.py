"""What is true of every codec."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.codecs import CODECS as TABLE
from broker.codecs import MIN_ELEMENTS, PIECE, Codec, applies, codec_of, decoded
from broker.errors import ConfigError, WireError
from broker.messages import DTYPES, Array, TensorRole, TensorSpec
from tests.support.vectors import CODECS, NAMES, SIZES, vector, vectors

each_codec = pytest.mark.parametrize("codec", CODECS, ids=NAMES)
SEEDS = st.integers(0, 2**53)


@each_codec
@given(values=vectors(), seed=SEEDS)
def test_planes_are_as_the_layout_says_and_decode_to_as_many_finite_values(
    codec: Codec, values: Array, seed: int
) -> None:
    planes = codec.encode(values, seed)

    assert [(p.dtype, p.shape) for p in planes] == [(DTYPES[d], (n,)) for d, n in codec.layout(values.size)]
    result = decoded(codec, planes, values.size, seed)
    assert result.shape == values.shape
    assert result.dtype == np.float32
    assert np.isfinite(result).all()


@each_codec
@given(values=vectors(), seed=SEEDS)
def test_encoding_leaves_its_input_alone_and_gives_the_same_again(codec: Codec, values: Array, seed: int) -> None:
    before = values.copy()
    values.flags.writeable = False

    first, second = codec.encode(values, seed), codec.encode(values, seed)

    assert values.tobytes() == before.tobytes()
    assert [p.tobytes() for p in first] == [p.tobytes() for p in second]


@each_codec
def test_zeros_stay_zeros(codec: Codec) -> None:
    values = np.zeros(3000, np.float32)

    assert not decoded(codec, codec.encode(values, 1), values.size, 1).any()


@each_codec
@pytest.mark.parametrize("size", [0, 1, 255, 257, 2**16 + 130, PIECE + 77])
def test_pieces_are_bounded_and_together_the_whole(codec: Codec, size: int) -> None:
    values = vector("normal", size)
    planes = codec.encode(values, 3)

    pieces = [piece.copy() for piece in codec.pieces(planes, size, 3)]

    assert all(0 < piece.size <= PIECE for piece in pieces)
    assert sum(piece.size for piece in pieces) == size
    assert b"".join(piece.tobytes() for piece in pieces) == decoded(codec, planes, size, 3).tobytes()


@each_codec
@pytest.mark.parametrize("size", SIZES)
def test_unaligned_read_only_planes_decode_to_the_same(codec: Codec, size: int) -> None:
    planes = codec.encode(vector("t(3)", size), 5)
    bodies = [b"x" + plane.tobytes() for plane in planes]
    views = [
        np.frombuffer(body, np.uint8, offset=1).view(plane.dtype) for body, plane in zip(bodies, planes, strict=True)
    ]

    assert decoded(codec, views, size, 5).tobytes() == decoded(codec, planes, size, 5).tobytes()


@each_codec
def test_a_part_of_a_larger_array_is_encoded_like_a_copy_of_it(codec: Codec) -> None:
    whole = vector("normal", 3001)

    part, copy = codec.encode(whole[1:], 1), codec.encode(whole[1:].copy(), 1)

    assert [p.tobytes() for p in part] == [p.tobytes() for p in copy]


@each_codec
@given(data=st.data(), size=st.sampled_from(SIZES), seed=SEEDS)
def test_any_bytes_are_refused_or_decode_to_finite_values(
    codec: Codec, data: st.DataObject, size: int, seed: int
) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    planes = []
    for dtype, count in codec.layout(size):
        body = np.frombuffer(random.bytes(count * DTYPES[dtype].itemsize), np.uint8).copy()
        body[random.random(body.size) < data.draw(st.sampled_from([0.0, 0.5, 0.99, 1.0]))] = 0
        planes.append(body.view(DTYPES[dtype]))

    try:
        result = decoded(codec, planes, size, seed)
    except WireError:
        return
    assert np.isfinite(result).all()


@each_codec
def test_planes_of_another_layout_are_refused_before_anything_is_decoded(codec: Codec) -> None:
    size = 3000
    planes = codec.encode(vector("normal", size), 0)

    wrong: list[tuple[Array, ...]] = [(), planes[:-1], (*planes, planes[0])]
    for number, plane in enumerate(planes):
        others = plane[:-1], np.append(plane, plane[:1]), plane.reshape(1, -1), plane.view(np.uint8), plane.view(">u1")
        wrong += [
            (*planes[:number], other, *planes[number + 1 :])
            for other in others
            if (other.dtype, other.shape) != (plane.dtype, plane.shape)
        ]
    for given_planes in wrong:
        with pytest.raises(WireError, match=codec.name):
            # Not iterated: the call itself refuses.
            codec.pieces(given_planes, size, 0)
    with pytest.raises(WireError):
        codec.pieces(planes, 2**50, 0)


@each_codec
def test_its_name_names_it(codec: Codec) -> None:
    assert codec_of(codec.name) == codec
    assert codec_of(codec.name) is codec_of(codec.name)
    assert hash(codec) == hash(codec_of(codec.name))
    assert codec.name.partition(":")[0] in TABLE.own


def test_codecs_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        codec_of("eden:2").bits = 5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "name"),
    [("eden", "eden:4"), ("topk", "topk:0.01"), ("topk:1e-2", "topk:0.01"), ("topk:0.010", "topk:0.01")],
)
def test_several_texts_name_the_same_codec(text: str, name: str) -> None:
    assert codec_of(text).name == name


@pytest.mark.parametrize(
    "text",
    [
        *("", "zip", "INT8", " int8", "int8:", "int8:4", "bf16:1", "fp16:x", "eden:", "eden:0", "eden:5", "eden:4.0"),
        *("eden:-1", "eden: 4", "topk:", "topk:0", "topk:-0.1", "topk:1.5", "topk:nan", "topk:inf", "topk:x"),
    ],
)
def test_what_names_no_codec_is_refused_with_what_does(text: str) -> None:
    with pytest.raises(ConfigError, match=r"eden:1 to eden:4|no argument|1 to 4 bits, like eden:4|like topk:0.01"):
        codec_of(text)


def test_a_name_from_a_message_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_of_a_peer.py").write_text("from broker.codecs.int8 import Int8\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for text in ("module_of_a_peer:Int8.of", "module_of_a_peer"):
        with pytest.raises(ConfigError, match="no codec is called"):
            codec_of(text)
    assert "module_of_a_peer" not in sys.modules


def test_only_what_is_left_out_must_be_kept() -> None:
    assert {codec.name for codec in CODECS if codec.feedback} == {"topk:0.01", "topk:0.3", "topk:1.0"}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (TensorSpec("w", (MIN_ELEMENTS,), "float32"), True),
        (TensorSpec("w", (2, MIN_ELEMENTS // 2), "bfloat16"), True),
        (TensorSpec("w", (MIN_ELEMENTS - 1,), "float32"), False),
        (TensorSpec("w", (), "float32"), False),
        (TensorSpec("w", (0, MIN_ELEMENTS), "float32"), False),
        (TensorSpec("w", (MIN_ELEMENTS,), "int64"), False),
        (TensorSpec("w", (MIN_ELEMENTS,), "float32", TensorRole.STATISTIC), False),
        (TensorSpec("w", (MIN_ELEMENTS,), "int64", TensorRole.COUNTER), False),
    ],
)
def test_codecs_are_for_large_floating_parameters(spec: TensorSpec, expected: bool) -> None:
    assert applies(spec) is expected
