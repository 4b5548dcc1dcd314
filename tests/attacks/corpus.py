"""Hostile messages: each with what an aggregator has to say to it.

All are well addressed: they come under a worker's own name and account, and their header's check is right unless the
check itself is the point, so that they get as far as they can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import zstandard

from broker.messages import (
    Array,
    Event,
    EventKind,
    Goodbye,
    Hello,
    Mode,
    ModelSpec,
    Parameters,
    Plan,
    Reason,
    TensorSpec,
    Update,
    UpdateId,
)
from broker.wire import encode, encode_in_chunks
from broker.wire.encoded import compressed
from broker.wire.envelope import MAGIC, PREFIX, header_check, pack, unpack
from broker.wire.sealed import Seal
from broker.wire.tensors import checksum

__all__ = ["MODEL", "Author", "Hostile", "corpus"]

#: Large enough for every codec, and for chunks of 64 KiB.
MODEL = ModelSpec((TensorSpec("w", (30_000,), "float32"), TensorSpec("v", (2,), "float32")))
CHUNK = 65_536

#: What runs a command when it is unpickled.
PICKLE = b"\x80\x04\x95\x1e\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02ls\x94\x85\x94R\x94."


@dataclass(frozen=True, slots=True)
class Hostile:
    """One message."""

    name: str
    body: bytes
    reason: Reason
    headers: Mapping[str, str | int] = field(default_factory=dict)
    chunks: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Author:
    """Writes updates for one run in one worker's name."""

    run: str
    worker: str
    epoch: int = 1

    def update(self, seq: int = 0, value: float = 1.0, **other: Any) -> Update:
        """A good one, unless ``other`` makes it something else."""
        good = Update(
            run=self.run,
            id=UpdateId(self.worker, "i", seq),
            base_version=0,
            base_epoch=self.epoch,
            mode=Mode.DELTA,
            examples=1,
            model=MODEL,
            tensors={"w": np.full(30_000, value, np.float32), "v": np.full(2, value, np.float32)},
        )
        return replace(good, **other)

    def altered(self, **changes: Any) -> bytes:
        """A good update with header fields changed (``a__b`` is b in a; None takes it out), and sealed again."""
        header, data = unpack(encode(self.update()))
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

    def with_values(self, w: Array, *, codec: str = "", seed: int = 0) -> bytes:
        """A good update with these values in ``w``."""
        tensors = {"w": w, "v": np.zeros(2, np.float32)}
        if not codec:
            return encode(self.update(tensors=tensors))
        return encode(self.update(tensors=compressed(MODEL, tensors, codec, seed), codec=codec, seed=seed))

    def coded(self, codec: str, change: Callable[[Array], None]) -> bytes:
        """A good update in ``codec`` whose bytes of data ``change`` has changed, with the right checksum."""
        header, data = unpack(self.with_values(np.linspace(-1, 1, 30_000, dtype=np.float32), codec=codec))
        values = np.frombuffer(bytes(data), np.uint8).copy()
        change(values)
        view = memoryview(values.tobytes())
        section = {**header["data"], "checksum": checksum([view])}
        return pack({**header, "data": section}, [view])


def raw(header: bytes, *, version: int = 1, magic: bytes = MAGIC, length: int | None = None) -> bytes:
    """A message of exactly this header."""
    return PREFIX.pack(magic, version, header_check(header), len(header) if length is None else length) + header


def typed(value: bytes) -> bytes:
    """A header of one field, ``type``, of these msgpack bytes."""
    return raw(b"\x81\xa4type" + value)


W = ["w", [30_000], "float32", "parameter"]
V = ["v", [2], "float32", "parameter"]


def table(*rows: Any) -> dict[str, Any]:
    """A table of tensors."""
    return {"frozen": "", "tensors": list(rows)}


def corpus(author: Callable[[int], Author]) -> Iterator[Hostile]:
    """All of them; ``author`` gives one for each number, so that no two are of the same worker if that matters."""
    makers = (*_no_message(), *_headers(), *_identities(), *_tables(), *_values(), *_codes(), *_chunked())
    for number, (name, reason, make) in enumerate(makers):
        made = make(author(number))
        yield replace(made, name=name, reason=reason) if isinstance(made, Hostile) else Hostile(name, made, reason)


Maker = tuple[str, Reason, Callable[[Author], bytes | Hostile]]


def _no_message() -> Iterator[Maker]:
    bad = Reason.MALFORMED
    yield "nothing", bad, lambda a: b""
    yield "one byte", bad, lambda a: b"F"
    yield "half a prefix", bad, lambda a: b"FdMQ\x01"
    yield "a pickle that runs a command", bad, lambda a: PICKLE
    yield "a pickle in a header's place", bad, lambda a: raw(PICKLE)
    yield "a zip file", bad, lambda a: b"PK\x03\x04" + bytes(60)
    yield "a torch checkpoint's magic", bad, lambda a: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + PICKLE
    yield "a YAML document", bad, lambda a: b"!!python/object/apply:os.system ['ls']\n"
    yield "a foreign magic", bad, lambda a: raw(b"\x80", magic=b"HTTP")
    yield "a megabyte of zeros", bad, lambda a: bytes(2**20)
    yield "an older format version", Reason.UNKNOWN_FORMAT, lambda a: raw(b"\x80", version=0)
    yield "a newer format version", Reason.UNKNOWN_FORMAT, lambda a: raw(b"\x80", version=255)
    yield "a header beyond the end", bad, lambda a: raw(b"\x80", length=10_000)
    yield "a header of 4 GB", bad, lambda a: raw(b"\x80", length=2**32 - 1)
    yield "a header with another check", bad, lambda a: raw(b"\x80").replace(header_check(b"\x80"), b"xyz")
    yield "cut in the header", bad, lambda a: encode(a.update())[:40]
    yield "cut in the data", bad, lambda a: encode(a.update())[:-1]
    yield "a byte too many", bad, lambda a: encode(a.update()) + b"\0"
    yield "a bit flipped in the data", bad, lambda a: encode(a.update())[:-1] + b"\1"
    yield "a hello among the updates", bad, lambda a: encode(Hello(run=a.run, worker=a.worker, incarnation="i"))
    yield "another run's version among the updates", bad, lambda a: encode(_version(a))
    yield "a chunk among the updates", bad, lambda a: _bomb(a, None)
    yield (
        "another run's event among the updates",
        bad,
        lambda a: encode(Event(run="another", kind=_BEAT, source=a.worker, time=1.0)),
    )
    yield "two updates in one", bad, lambda a: encode(a.update()) + encode(a.update(1))
    yield "a seal that is cut", bad, lambda a: bytes(Seal(b"k" * 8, b"s" * 64))[:100]
    yield "a seal before a seal", bad, lambda a: bytes(Seal(b"k" * 8, b"s" * 64)) * 2 + encode(a.update())
    yield "a seal with something in its zeros", bad, _sealed_badly
    yield "a goodbye of another", bad, lambda a: encode(Goodbye(run=a.run, worker="good", incarnation="i"))


_BEAT = EventKind.HEARTBEAT


def _version(author: Author) -> Parameters:
    good = author.update()
    facts: Any = {"run": "another", "epoch": 1, "version": 2**53, "plan": Plan(done=True), "digest": "0" * 64}
    return Parameters(**facts, model=good.model, tensors=good.tensors)


def _sealed_badly(author: Author) -> bytes:
    seal = bytearray(bytes(Seal(b"k" * 8, b"s" * 64)))
    seal[127] = 1
    return bytes(seal) + encode(author.update())


def _headers() -> Iterator[Maker]:
    bad = Reason.MALFORMED
    yield "a header that is a list", bad, lambda a: raw(b"\x90")
    yield "a header that is a number", bad, lambda a: raw(b"\x01")
    yield "an empty header", bad, lambda a: raw(b"\x80")
    yield "a type that is a map", bad, lambda a: raw(msgpack.packb({"type": {"a": 1}}))
    yield "an unknown type", bad, lambda a: raw(msgpack.packb({"type": "shutdown"}))
    yield "lists nested 100,000 deep", bad, lambda a: typed(b"\x91" * 100_000 + b"\xc0")
    yield "maps nested 100,000 deep", bad, lambda a: typed(b"\x81\xa1a" * 100_000 + b"\xc0")
    yield "lists nested 500 deep", bad, lambda a: typed(b"\x91" * 500 + b"\xc0")
    yield "a list of 2^32", bad, lambda a: typed(b"\xdd\xff\xff\xff\xff")
    yield "a map of 2^32", bad, lambda a: raw(b"\xdf\xff\xff\xff\xff")
    yield "a text of 4 GB", bad, lambda a: typed(b"\xdb\xff\xff\xff\xff")
    yield "bytes of 4 GB", bad, lambda a: typed(b"\xc6\xff\xff\xff\xff")
    yield "lists of 65,535 each, nested", bad, lambda a: typed(b"\xdc\xff\xff" * 150_000)
    yield "half a million maps", bad, lambda a: typed(b"\xdc\x00\x7f" + (b"\xdc\x10\x00" + b"\x80" * 4096) * 127)
    yield "an extension type", bad, lambda a: typed(msgpack.packb(msgpack.ExtType(5, b"x")))
    yield "a timestamp", bad, lambda a: typed(msgpack.packb(msgpack.Timestamp(1)))
    yield "a key twice", bad, lambda a: raw(b"\x82\xa4type\xa5hello\xa4type\xa6update")
    yield "a number as a key", bad, lambda a: raw(b"\x81\x01\x02")
    yield "text that is no UTF-8", bad, lambda a: typed(b"\xa2\xff\xfe")
    yield "a lone surrogate", bad, lambda a: typed(b"\xa3\xed\xa0\x80")
    yield "a surplus key", bad, lambda a: a.altered(surprise=1)
    yield "a class to be made", bad, lambda a: a.altered(**{"$class": "os.system"})
    yield "250 metrics", bad, lambda a: a.altered(metrics={f"m{i}": 1.0 for i in range(250)})
    yield "a metric whose name drives a terminal", bad, lambda a: a.altered(metrics={"\x1b[2Jloss": 1.0})
    yield "metrics as text", bad, lambda a: a.altered(metrics={"loss": "low"})
    yield "seconds as text", bad, lambda a: a.altered(seconds="1")
    yield "an effort of NaN", bad, lambda a: a.altered(effort=float("nan"))


def _identities() -> Iterator[Maker]:
    bad = Reason.MALFORMED
    yield "another run", Reason.WRONG_RUN, lambda a: a.altered(run="another")
    yield "a run with a wildcard", bad, lambda a: a.altered(run="#")
    yield "a run in look-alike letters", bad, lambda a: a.altered(run="dіgits")  # noqa: RUF001 (the point)
    yield "a name that leads out of a folder", bad, lambda a: a.altered(id__worker="../../etc")
    yield "a name with a line break", bad, lambda a: a.altered(id__worker=f"{a.worker}\n")
    yield "a name with a NUL", bad, lambda a: a.altered(id__worker=f"{a.worker}\0")
    yield "a name that runs from right to left", bad, lambda a: a.altered(id__worker="\u202e1w")
    yield "a name in fullwidth letters", bad, lambda a: a.altered(id__worker="ｗ1")  # noqa: RUF001 (the point)
    yield "a name of 1,000 letters", bad, lambda a: a.altered(id__worker="w" * 1000)
    yield "a name that is a number", bad, lambda a: a.altered(id__worker=1)
    yield "a seq of 2^64 - 1", bad, lambda a: a.altered(id__seq=2**64 - 1)
    yield "a negative seq", bad, lambda a: a.altered(id__seq=-1)
    yield "a seq that is true", bad, lambda a: a.altered(id__seq=True)
    yield "a seq of 1.0", bad, lambda a: a.altered(id__seq=1.0)
    yield "an incarnation that is missing", bad, lambda a: a.altered(id__incarnation=None)
    yield "a version of the future", Reason.FUTURE_VERSION, lambda a: a.altered(base_version=2**53)
    yield "a version of 2^60", bad, lambda a: a.altered(base_version=2**60)
    yield "a negative version", bad, lambda a: a.altered(base_version=-1)
    yield "a mode that there is not", bad, lambda a: a.altered(mode="weights")
    yield "a mode that the run has not", Reason.WRONG_MODE, lambda a: a.altered(mode="parameters")
    yield "no examples", Reason.NO_EXAMPLES, lambda a: a.altered(examples=0)
    yield "negative examples", bad, lambda a: a.altered(examples=-5)
    yield "2^63 examples", bad, lambda a: a.altered(examples=2**63)


def _tables() -> Iterator[Maker]:
    bad = Reason.MALFORMED
    yield "no model", bad, lambda a: a.altered(model=None)
    yield "no tensors", bad, lambda a: a.altered(model=table())
    yield "a tensor twice", bad, lambda a: a.altered(model=table(W, ["w", [2], "float32", "parameter"]))
    yield "a surplus column, an offset", bad, lambda a: a.altered(model=table([*W, 0], [*V, 0]))
    yield "a surplus tensor", Reason.MODEL_MISMATCH, lambda a: _remade(a, {"x": np.zeros(2, np.float32)})
    yield "a tensor less", Reason.MODEL_MISMATCH, lambda a: _remade(a, {}, leave=("v",))
    yield "another dtype", Reason.MODEL_MISMATCH, lambda a: _remade(a, {"v": np.zeros(2, np.float64)})
    yield "another shape", Reason.MODEL_MISMATCH, lambda a: _remade(a, {"v": np.zeros((2, 1), np.float32)})
    yield (
        "a name in look-alike letters",
        Reason.MODEL_MISMATCH,
        lambda a: _remade(a, {"\u0475": np.zeros(2, np.float32)}, leave=("v",)),
    )
    yield (
        "a name that drives a terminal",
        Reason.MODEL_MISMATCH,
        lambda a: _remade(a, {"\x1b]0;owned\x07\u202e": np.zeros(2, np.float32)}, leave=("v",)),
    )
    yield "another order", bad, lambda a: a.altered(model=table(V, W))
    yield "a negative shape", bad, lambda a: a.altered(model=table(["w", [-2], "float32", "parameter"], V))
    yield "a shape of 2^62", bad, lambda a: a.altered(model=table(["w", [2**31, 2**31], "float32", "parameter"], V))
    yield (
        "a shape that wraps to the right size",
        bad,
        lambda a: a.altered(model=table(["w", [2**32, 2**32, 30_000], "float32", "parameter"], V)),
    )
    yield (
        "a shape of 0 and 2^53",
        bad,
        lambda a: a.altered(model=table(["w", [0, 2**53, 2**53], "float32", "parameter"], V)),
    )
    yield "a shape of floats", bad, lambda a: a.altered(model=table(["w", [3e4], "float32", "parameter"], V))
    yield "17 dimensions", bad, lambda a: a.altered(model=table(["w", [1] * 17, "float32", "parameter"], V))
    for dtype in ("object", "|O8", "str", "U8", "float128", "datetime64[s]", "complex64", "V16", "float32\0"):
        yield f"dtype {dtype!r}", bad, lambda a, d=dtype: a.altered(model=table(["w", [30_000], d, "parameter"], V))  # type: ignore[misc]
    yield "an unknown role", bad, lambda a: a.altered(model=table(["w", [30_000], "float32", "code"], V))
    yield "a name of 300 letters", bad, lambda a: a.altered(model=table(["w" * 300, [2], "float32", "parameter"], V))
    yield "an empty name", bad, lambda a: a.altered(model=table(W, ["", [2], "float32", "parameter"]))
    yield "less data announced", bad, lambda a: a.altered(data__nbytes=8)
    yield "2^40 bytes announced", bad, lambda a: a.altered(data__nbytes=2**40)
    yield "a negative size", bad, lambda a: a.altered(data__nbytes=-1)
    yield "no checksum", bad, lambda a: a.altered(data__checksum=None)
    yield "a checksum of the wrong type", bad, lambda a: a.altered(data__checksum=0)
    yield "a wrong checksum", bad, lambda a: a.altered(data__checksum="0" * 32)


def _remade(author: Author, more: Mapping[str, Array], leave: tuple[str, ...] = ()) -> bytes:
    """A consistent update of another model than the run's."""
    good = {name: np.zeros(spec.shape, np.float32) for name, spec in zip("wv", MODEL.tensors, strict=True)}
    tensors: dict[str, Any] = {name: array for name, array in {**good, **more}.items() if name not in leave}
    specs = tuple(TensorSpec(name, array.shape, array.dtype.name) for name, array in tensors.items())
    return encode(author.update(model=ModelSpec(specs), tensors=tensors))


def _values() -> Iterator[Maker]:
    for name, value in (("NaN", np.nan), ("infinity", np.inf), ("minus infinity", -np.inf)):
        yield name, Reason.NOT_FINITE, lambda a, v=value: a.with_values(_one(v))  # type: ignore[misc]
    yield "a signalling NaN", Reason.NOT_FINITE, lambda a: a.with_values(_one_bits(0x7F800001))
    yield (
        "values whose sum of squares is infinite",
        Reason.NOT_FINITE,
        lambda a: a.with_values(np.full(30_000, np.finfo(np.float32).max, np.float32)),
    )


def _one(value: float) -> Array:
    values = np.zeros(30_000, np.float32)
    values[-1] = value
    return values


def _one_bits(bits: int) -> Array:
    values = np.zeros(30_000, np.float32)
    values.view(np.uint32)[-1] = bits
    return values


def _codes() -> Iterator[Maker]:
    bad = Reason.MALFORMED
    yield "a codec that there is not", bad, lambda a: a.altered(data__codec="lz99")
    yield "a codec by path", bad, lambda a: a.altered(data__codec="x=os:system")
    yield "a codec that is to be imported", bad, lambda a: a.altered(data__codec="os:system")
    yield "a codec that is a number", bad, lambda a: a.altered(data__codec=4)
    yield "eden of 99 bits", bad, lambda a: a.altered(data__codec="eden:99")
    yield "topk of a negative share", bad, lambda a: a.altered(data__codec="topk:-1")
    yield "topk of NaN", bad, lambda a: a.altered(data__codec="topk:nan")
    yield "int8 for plain data", bad, lambda a: a.altered(data__codec="int8")
    yield "a seed of 2^60", bad, lambda a: a.altered(data__codec="eden:4", data__seed=2**60)
    yield "a seed that is true", bad, lambda a: a.altered(data__seed=True)
    yield "fp16: infinity", bad, lambda a: a.coded("fp16", lambda d: _put(d, 0, np.float16(np.inf)))
    yield "fp16: NaN", bad, lambda a: a.coded("fp16", lambda d: _put(d, 0, np.float16(np.nan)))
    yield "bf16: infinity", bad, lambda a: a.coded("bf16", lambda d: _put(d, 0, ml_dtypes.bfloat16(np.inf)))
    yield "int8: a scale that overflows", bad, lambda a: a.coded("int8", lambda d: _put(d, 0, np.finfo(np.float32).max))
    yield "int8: a negative scale", bad, lambda a: a.coded("int8", lambda d: _put(d, 0, np.float32(-1)))
    yield "int8: a scale of NaN", bad, lambda a: a.coded("int8", lambda d: _put(d, 0, np.float32(np.nan)))
    yield "int8: the code -128", bad, lambda a: a.coded("int8", lambda d: _put(d, 2048, np.int8(-128)))
    yield "eden: an infinite scale", bad, lambda a: a.coded("eden:4", lambda d: _put(d, 0, np.float32(np.inf)))
    yield "eden: a negative scale", bad, lambda a: a.coded("eden:4", lambda d: _put(d, 0, np.float32(-1)))
    yield "topk: more values than there are", bad, lambda a: a.coded("topk:0.01", lambda d: _put(d, 0, np.int32(2**30)))
    yield "topk: a negative count", bad, lambda a: a.coded("topk:0.01", lambda d: _put(d, 0, np.int32(-1)))
    yield "topk: indices that fall", bad, lambda a: a.coded("topk:0.01", lambda d: _put(d, 64, np.uint16(65_535)))
    yield (
        "topk: an index beyond the tensor",
        bad,
        lambda a: a.coded("topk:0.01", lambda d: _put(d, 64 + 2 * 299, np.uint16(65_000))),
    )


def _put(data: Array, at: int, value: Any) -> None:
    data[at : at + value.nbytes] = np.frombuffer(value.tobytes(), np.uint8)


def _chunked() -> Iterator[Maker]:
    bad, gone = Reason.MALFORMED, Reason.INCOMPLETE
    yield "a manifest without chunks", gone, lambda a: _upload(a, lambda chunks: [])
    yield "a chunk less", gone, lambda a: _upload(a, lambda chunks: chunks[:-1])
    yield "a chunk damaged", bad, lambda a: _upload(a, lambda chunks: [chunks[0][:-1] + b"x", *chunks[1:]])
    yield "a chunk that is a pickle", bad, lambda a: _upload(a, lambda chunks: [PICKLE, *chunks[1:]])
    yield "chunks exchanged", bad, lambda a: _upload(a, lambda chunks: [chunks[1], chunks[0], *chunks[2:]])
    yield "a chunk that unpacks to a gigabyte", bad, lambda a: _upload(a, lambda c: [_bomb(a, 2**30), *c[1:]])
    yield "a chunk that does not say how large it is", bad, lambda a: _upload(a, lambda c: [_bomb(a, None), *c[1:]])
    yield "headers that name other chunks", bad, lambda a: replace(_upload(a, lambda c: c), headers={"chunks": 3})
    yield "chunks without end", bad, lambda a: _listing(a, [[1, "0" * 32]] * 4097)
    yield "a chunk of 2^62 bytes", bad, lambda a: _listing(a, [[2**62, "0" * 32]])
    yield "a chunk of negative size", bad, lambda a: _listing(a, [[-64, "0" * 32], [120_136, "0" * 32]])
    yield "chunks of no size", bad, lambda a: _listing(a, [[0, "0" * 32], [120_072, "0" * 32]])
    yield "a list of chunks that is text", bad, lambda a: _listing(a, "all")


def _upload(author: Author, change: Callable[[list[bytes]], list[bytes]]) -> Hostile:
    update = author.update()
    body, chunks = encode_in_chunks(update, str(update.id), CHUNK)
    header, _ = unpack(body)
    facts: dict[str, str | int] = {"chunks": len(chunks), "bytes": header["data"]["nbytes"]}
    return Hostile("", body, Reason.MALFORMED, facts, tuple(change(list(chunks))))


def _listing(author: Author, chunks: Any) -> bytes:
    return author.altered(data__chunks=chunks, data__checksum=None)


def _bomb(author: Author, announced: int | None) -> bytes:
    """A packed chunk of some ten kilobytes, in whose place 64 KiB are expected."""
    size = 2**26  # a frame's header can announce more than it holds
    writer = zstandard.ZstdCompressor(level=1, write_content_size=announced is not None)
    packed = writer.compress(bytes(size))
    if announced is not None:
        packed = packed.replace(size.to_bytes(4, "little"), announced.to_bytes(4, "little"), 1)
    return pack({"type": "chunk", "of": f"{author.worker}/i/0", "index": 0, "zstd": True}, [memoryview(packed)])
