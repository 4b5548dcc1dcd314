"""What the decoder gives back, and what it refuses: with a WireError, never with anything else."""

from __future__ import annotations

import struct
import time
import tracemalloc
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from broker.errors import MessageTooLarge, ModelMismatch, UnknownFormat, WireError
from broker.messages import Event, EventKind, Hello, ModelSpec, TensorSpec, Update, whole
from broker.wire import decode, encode
from broker.wire.envelope import MAGIC, MAX_TENSORS, PREFIX, header_check, pack, unpack
from tests.support.builders import update_of, vector

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)
ARRAYS = hnp.arrays(
    st.sampled_from([np.float16, np.float32, np.float64, np.int8, np.int16, np.int32, np.int64, np.uint8]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
)


@given(tensors=st.dictionaries(NAMES, ARRAYS, min_size=1, max_size=5), loss=st.floats(allow_nan=False))
def test_an_update_comes_back_bit_for_bit(tensors: dict[str, Any], loss: float) -> None:
    update = update_of(tensors, metrics={"loss": loss})

    back = decode(encode(update))

    assert isinstance(back, Update)
    assert back.id == update.id
    assert back.metrics == update.metrics
    assert back.model == update.model
    for name, array in tensors.items():
        assert back.tensors[name].dtype == array.dtype
        assert back.tensors[name].shape == array.shape
        assert whole(back.tensors[name]).tobytes() == array.tobytes()


def test_tensors_are_read_only_views_of_the_body() -> None:
    body = encode(update_of({"w": vector(1, 2, 3)}))

    back = decode(body)

    assert isinstance(back, Update)
    assert not whole(back.tensors["w"]).flags.writeable
    assert np.shares_memory(whole(back.tensors["w"]), np.frombuffer(body, np.uint8))


@pytest.mark.parametrize(
    "array",
    [
        vector(1, 2, dtype=">f4"),
        np.arange(12, dtype=np.float32).reshape(3, 4).T,
        np.arange(12, dtype=np.float32)[::2],
        np.array([1, 2], ml_dtypes.bfloat16),
        np.array(3.0, np.float32),
    ],
    ids=["big-endian", "transposed", "strided", "bfloat16", "scalar"],
)
def test_any_memory_layout_travels(array: Any) -> None:
    back = decode(encode(update_of({"w": array})))

    assert isinstance(back, Update)
    np.testing.assert_array_equal(np.asarray(back.tensors["w"], np.float64), np.asarray(array, np.float64))


def test_tensors_that_do_not_fit_the_model_are_refused_by_the_sender() -> None:
    good = update_of({"w": vector(1, 2)})
    bad = Update(**{**_fields(good), "tensors": {"w": vector(1, 2, 3)}})

    with pytest.raises(ModelMismatch, match="w: expected"):
        encode(bad)


def test_a_model_of_too_many_tensors_is_refused_by_the_sender() -> None:
    tensors = {f"layer.{i}." + "x" * 120: vector(1) for i in range(MAX_TENSORS)}

    with pytest.raises(MessageTooLarge, match="shorten"):
        encode(update_of(tensors))


def _fields(message: Any) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__dataclass_fields__}


# ------------------------------------------------------------------------------------------- hostile bytes


def header_of(body: bytes) -> dict[str, Any]:
    return dict(unpack(body)[0])


def altered(**changes: Any) -> bytes:
    """A good update with header fields changed (or, if None, removed), and its data."""
    body = encode(update_of({"w": vector(1, 2), "v": vector(3)}))
    header, data = unpack(body)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place: Any = header
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return pack(header, [data])


def raw(
    header: bytes, *, version: int = 1, magic: bytes = MAGIC, length: int | None = None, data: bytes = b""
) -> bytes:
    return PREFIX.pack(magic, version, header_check(header), len(header) if length is None else length) + header + data


def deep(levels: int) -> bytes:
    return b"\x81\xa4type" + b"\x91" * levels + b"\xc0"


GOOD = encode(update_of({"w": vector(1, 2), "v": vector(3)}))
W = ["w", [2], "float32", "parameter"]
V = ["v", [1], "float32", "parameter"]


def table(*rows: Any) -> dict[str, Any]:
    return {"frozen": "", "tensors": list(rows)}


HOSTILE = {
    "nothing": b"",
    "too short": b"FdMQ\x01",
    "pickle": b"\x80\x04\x95\x1e\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02ls\x94\x85\x94R\x94.",
    "zip file": b"PK\x03\x04" + bytes(60),
    "foreign magic": raw(b"\x80", magic=b"HTTP"),
    "header beyond the end": raw(b"\x80", length=10_000),
    "header of 4 GB": raw(b"\x80", length=2**32 - 1),
    "header is a list": raw(b"\x90"),
    "header is a number": raw(b"\x01"),
    "no type": raw(b"\x80"),
    "type is a number": raw(msgpack.packb({"type": 3})),
    "type is a map": raw(msgpack.packb({"type": {"a": 1}})),
    "unknown type": raw(msgpack.packb({"type": "shutdown"})),
    "bytes after the header": raw(b"\x80\x80"),
    "cut header": raw(msgpack.packb({"type": "hello", "run": "r"})[:-3]),
    "nested 100000 deep": raw(deep(100_000)),
    "nested 500 deep": raw(deep(500)),
    "array of 2^32 announced": raw(b"\x81\xa4type\xdd\xff\xff\xff\xff"),
    "arrays that announce 65535, nested": raw(b"\x81\xa4type" + b"\xdc\xff\xff" * 100),
    "map of 2^32 announced": raw(b"\xdf\xff\xff\xff\xff"),
    "text of 4 GB announced": raw(b"\x81\xa4type\xdb\xff\xff\xff\xff"),
    "extension type": raw(b"\x81\xa4type" + msgpack.packb(msgpack.ExtType(5, b"x"))),
    "timestamp": raw(b"\x81\xa4type" + msgpack.packb(msgpack.Timestamp(1))),
    "key twice": raw(b"\x82\xa4type\xa5hello\xa4type\xa6update"),
    "number as key": raw(b"\x81\x01\x02"),
    "broken UTF-8": raw(b"\x81\xa4type\xa2\xff\xfe"),
    "unknown key": altered(surprise=1),
    "run with a dot": altered(run="a.b"),
    "run with a wildcard": altered(run="#"),
    "run of 65 letters": altered(run="a" * 65),
    "run in look-alike letters": altered(run="dіgits"),  # noqa: RUF001 (that is the point)
    "run is missing": altered(run=None),
    "negative version": altered(base_version=-1),
    "version as text": altered(base_version="1"),
    "version as float": altered(base_version=1.5),
    "version as boolean": altered(base_version=True),
    "version of 2^60": altered(base_version=2**60),
    "negative examples": altered(examples=-5),
    "unknown mode": altered(mode="weights"),
    "worker's name with a slash": altered(id__worker="../../etc"),
    "negative seq": altered(id__seq=-1),
    "metrics are no map": altered(metrics=[1]),
    "metrics as text": altered(metrics={"loss": "low"}),
    "metrics beyond count": altered(metrics={f"m{i}": 1.0 for i in range(65)}),
    "no model": altered(model=None),
    "no tensors": altered(model=table()),
    "table with a surplus column": altered(model=table([*W, 0], V)),
    "tensor twice": altered(model=table(W, ["w", [1], "float32", "parameter"])),
    "negative shape": altered(model=table(["w", [-2], "float32", "parameter"], V)),
    "shape of 2^62": altered(model=table(["w", [2**31, 2**31], "float32", "parameter"], V)),
    "shapes whose product wraps": altered(model=table(["w", [2**32, 2**32], "float32", "parameter"], V)),
    "17 dimensions": altered(model=table(["w", [1] * 17, "float32", "parameter"], V)),
    "dtype object": altered(model=table(["w", [2], "object", "parameter"], V)),
    "dtype O8": altered(model=table(["w", [2], "|O8", "parameter"], V)),
    "unknown role": altered(model=table(["w", [2], "float32", "code"], V)),
    "name of 300 letters": altered(model=table(["w" * 300, [2], "float32", "parameter"], V)),
    "other dtype, other size": altered(model=table(["w", [40], "float64", "parameter"], V)),
    "other order": altered(model=table(V, W)),
    "frozen is no digest": altered(model={"frozen": "xyz", "tensors": [W, V]}),
    "no data section": altered(data=None),
    "data announced as text": altered(data__nbytes="68"),
    "less data announced": altered(data__nbytes=8),
    "more data announced": altered(data__nbytes=2**40),
    "no checksum": altered(data__checksum=None),
    "wrong checksum": altered(data__checksum="0" * 32),
    "checksum as number": altered(data__checksum=5),
    "data cut": GOOD[:-1],
    "data too long": GOOD + b"\0",
    "a bit flipped in the data": GOOD[:-1] + bytes([GOOD[-1] ^ 1]),
    "a manifest with data": altered(data__chunks=[[68, "0" * 32]]),
    "hello with data": pack(header_of(encode(Hello(run="r", worker="w", incarnation="i"))), [memoryview(b"data")]),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_one_error_soon_and_in_little_memory(body: bytes) -> None:
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(WireError):
        decode(body)
    seconds = time.perf_counter() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 64 * 2**20
    # A bound on work, not a measure of speed: what it guards against takes minutes.
    assert seconds < 5


def test_a_manifest_lies_about_its_chunks() -> None:
    header, _ = unpack(GOOD)
    for chunks in ([[1, "0" * 32]], [[68, "x", 1]], [[-4, "0" * 32], [72, "0" * 32]], "all", [[0, ""], [68, ""]]):
        with pytest.raises(WireError):
            decode(pack({**header, "data": {"nbytes": 68, "chunks": chunks}}))


@pytest.mark.parametrize("version", [0, 3, 255])
def test_another_format_version_says_so(version: int) -> None:
    with pytest.raises(UnknownFormat, match="upgrade"):
        decode(raw(b"\x80", version=version))


@given(body=st.binary(max_size=200))
def test_random_bytes_are_one_error(body: bytes) -> None:
    with pytest.raises(WireError):
        decode(body)


@example(position=168, bit=0)  # a shape in the table: the data are as long as before, and their checksum holds
@given(position=st.integers(0, len(GOOD) - 1), bit=st.integers(0, 7))
def test_one_flipped_bit_is_noticed_or_harmless(position: int, bit: int) -> None:
    """Anywhere in the message: either an error, or an update with the same numbers in it."""
    body = bytearray(GOOD)
    body[position] ^= 1 << bit
    try:
        back = decode(bytes(body))
    except WireError:
        return
    if isinstance(back, Update):
        values = np.concatenate([whole(array).reshape(-1).view(np.uint8) for array in back.tensors.values()])
        assert values.tobytes() == vector(1, 2, 3).tobytes()


@given(length=st.integers(0, len(GOOD) - 1))
def test_a_truncated_message_is_an_error(length: int) -> None:
    with pytest.raises(WireError):
        decode(GOOD[:length])


def test_prefix_is_what_the_format_page_says() -> None:
    assert GOOD[:4] == b"FdMQ"
    assert GOOD[4] == 1
    (length,) = struct.unpack_from("<I", GOOD, 8)
    assert GOOD[5:8] == xxhash.xxh3_64(GOOD[12 : 12 + length]).digest()[:3]
    assert msgpack.unpackb(GOOD[12 : 12 + length])["type"] == "update"


def test_event_data_keeps_its_types() -> None:
    data = {"whole": 3, "real": 3.0, "yes": True, "none": None, "text": "3"}

    back = decode(encode(Event(run="r", kind=EventKind.PROGRESS, source="a", time=0.0, data=data)))

    assert isinstance(back, Event)
    assert {key: type(value) for key, value in back.data.items()} == {k: type(v) for k, v in data.items()}


def test_a_difference_between_models_is_shown() -> None:
    ours = ModelSpec((TensorSpec("a", (2,), "float32"), TensorSpec("b", (3,), "float32")))
    theirs = ModelSpec((TensorSpec("a", (2,), "float16"), TensorSpec("c", (3,), "float32")))

    with pytest.raises(ModelMismatch) as caught:
        ours.require_same(theirs)

    text = str(caught.value)
    assert "a: the run has float32[2] parameter, this model has float16[2] parameter" in text
    assert "b: only the run has it" in text
    assert "c: only this model has it" in text
