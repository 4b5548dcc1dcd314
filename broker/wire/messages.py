"""Messages to bytes and back. The header's fields are the fields of the dataclasses in ``broker.messages``."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from broker.codecs import Codec, codec_of
from broker.errors import BadSignature, WireError, first_problem
from broker.messages import (
    ChunkHead,
    Command,
    Delta,
    Event,
    Goodbye,
    Hello,
    Manifest,
    ModelSpec,
    Parameters,
    ParametersHead,
    Update,
    UpdateHead,
)
from broker.wire.encoded import known_codec
from broker.wire.envelope import MAX_TENSORS, frame, unpack
from broker.wire.sealed import Sealing, digest_of
from broker.wire.section import Section
from broker.wire.tensors import STRONG, blocks, checksum, data_length, matches, read

__all__ = [
    "Message",
    "chunk_header",
    "decode",
    "encode",
    "encode_parts",
    "manifest_of",
    "order_in",
    "read_chunk",
    "section_of",
    "with_tensors",
]

Message = Update | Parameters | Manifest | Hello | Goodbye | Command | Event

#: A chunk's word in ``type``. It is no message: nothing reads it but whoever has the manifest.
CHUNK = "chunk"

#: The word in the header's ``type`` field, and the class that holds the small facts. One line a message.
_HEADS: dict[str, type] = {
    "update": UpdateHead,
    "parameters": ParametersHead,
    "hello": Hello,
    "goodbye": Goodbye,
    "command": Command,
    "event": Event,
}
_TYPES = {head: word for word, head in _HEADS.items()} | {Update: "update", Parameters: "parameters"}
_WITH_TENSORS: dict[type, type] = {UpdateHead: Update, ParametersHead: Parameters}


def encode(message: Message, sealing: Sealing | None = None) -> bytes:
    """``message`` as bytes; with ``sealing``, signed (:mod:`broker.wire.sealed`).

    Raises :class:`ModelMismatch` if tensors do not fit the message's model, :class:`MessageTooLarge` if the
    model has too many tensors to describe.
    """
    if isinstance(message, Manifest):
        header = _head(message.head) | {"model": _model(message.model)}
        chunks = [list(chunk) for chunk in message.chunks]
        header["data"] = {"nbytes": message.nbytes, "chunks": chunks, **_code(message)}
        if message.state:
            header["data"] |= {"state": message.state, "delta": _plain(message.delta) if message.delta else None}
        return b"".join(_sealed(frame(header), sealing))
    if isinstance(message, Update | Parameters):
        return b"".join(encode_parts(message, sealing))
    return b"".join(_sealed(frame(_head(message)), sealing))


def encode_parts(message: Update | Parameters, sealing: Sealing | None = None) -> list[bytes | memoryview]:
    """``message`` as :func:`encode` gives it, in parts that borrow its tensors. Raises as :func:`encode`."""
    codec = _codec_in(message)
    data = blocks(message.model, message.tensors, codec)
    header = _head(message) | {"model": _model(message.model)}
    of_data = checksum(data, strong=sealing is not None)
    header["data"] = {"nbytes": data_length(message.model, codec), "checksum": of_data, **_code(message)}
    return _sealed(frame(header, data), sealing)


def _sealed(parts: list[bytes | memoryview], sealing: Sealing | None) -> list[bytes | memoryview]:
    # The first three are what stands before the data.
    return parts if sealing is None else [sealing(digest_of(parts[:3])), *parts]


def _codec_in(message: Update | Parameters) -> Codec | None:
    return codec_of(message.codec) if message.codec else None


def _code(message: Update | Parameters | Manifest) -> dict[str, Any]:
    return {"codec": message.codec, "seed": message.seed} if message.codec else {}


def section_of(message: Update | Parameters) -> Section:
    """The data section of ``message``, borrowed from its tensors. Raises :class:`ModelMismatch`."""
    codec = _codec_in(message)
    return Section(blocks(message.model, message.tensors, codec))


def manifest_of(message: Update | Parameters, nbytes: int, chunks: tuple[tuple[int, str], ...]) -> Manifest:
    """What announces ``message`` if its section travels in ``chunks``."""
    head_class = _HEADS[_TYPES[type(message)]]
    head = head_class(**{f.name: getattr(message, f.name) for f in fields(head_class)})
    return Manifest(
        head=head, model=message.model, nbytes=nbytes, chunks=chunks, codec=message.codec, seed=message.seed
    )


def with_tensors(manifest: Manifest, section: Section) -> Update | Parameters:
    """The message that ``manifest`` announces, its tensors being views of ``section``. Raises :class:`WireError`."""
    head = manifest.head
    facts = {f.name: getattr(head, f.name) for f in fields(head)}
    codec = known_codec(manifest.codec) if manifest.codec else None
    tensors = read(manifest.model, section, codec, manifest.seed)
    return _WITH_TENSORS[type(head)](  # type: ignore[no-any-return]
        **facts, model=manifest.model, tensors=tensors, codec=manifest.codec, seed=manifest.seed
    )


def chunk_header(head: ChunkHead, *, is_packed: bool) -> dict[str, Any]:
    """The header of a chunk."""
    return {"type": CHUNK, "of": head.of, "index": head.index, "zstd": is_packed}


def read_chunk(body: bytes) -> tuple[ChunkHead, bool, memoryview]:
    """Which chunk ``body`` is, whether it is packed, and what it carries. Raises :class:`WireError`."""
    header, data = unpack(body)
    is_packed = header.pop("zstd", None)
    if header.pop("type", None) != CHUNK or not isinstance(is_packed, bool):
        raise WireError("this message is no chunk")
    return _validated(ChunkHead, header), is_packed, data


def decode(body: bytes | memoryview, *, strong: bool = False) -> Message:
    """The message in ``body``, signed or not. Tensors are read-only views of ``body``.

    With ``strong``, each checksum in it must be one that cannot be forged: of what is believed for its signature. That
    this is one was looked at before (:mod:`broker.signing`).

    Raises :class:`UnknownFormat` for another format version and :class:`WireError` for everything else that
    does not follow the format; no other exception, whatever the bytes.
    """
    header, data = unpack(body)
    word = header.pop("type", None)
    head_class = _HEADS.get(word) if isinstance(word, str) else None
    if head_class is None:
        raise WireError(f"unknown message type {word!r:.80}")
    if head_class not in _WITH_TENSORS:
        if data.nbytes:
            raise WireError(f"a message of type {word} carries no data; this one has {data.nbytes} bytes")
        return _validated(head_class, header)  # type: ignore[no-any-return]
    model = _read_model(header.pop("model", None))
    section = header.pop("data", None)
    head = _validated(head_class, header)
    if not isinstance(section, dict) or not isinstance(section.get("nbytes"), int):
        raise WireError("the header does not describe a data section")
    codec, seed = section.pop("codec", ""), section.pop("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= 2**53:
        raise WireError(f"a seed of {seed!r:.40}")
    expected = data_length(model, known_codec(codec) if codec else None)
    if section["nbytes"] != expected:
        raise WireError(f"{section['nbytes']!r:.40} bytes announced; the table describes {expected}")
    whole = Manifest(head=head, model=model, nbytes=expected, chunks=(), codec=codec, seed=seed)
    if "chunks" in section:
        return _read_manifest(whole, section, data, strong=strong)
    if section.keys() != {"nbytes", "checksum"} or not matches(data, section["checksum"], strong=strong):
        # Before the data all was as it is signed.
        kind = BadSignature if strong else WireError
        raise kind("the checksum does not match the data: the message was damaged on its way")
    return with_tensors(whole, Section([data]))


def order_in(body: bytes) -> tuple[int, int, int]:
    """Epoch, version and attempt of the version ``body``, which is as it was signed, if its signature is one.

    Raises :class:`WireError`, also if it is none or its tensors are others.
    """
    message = decode(body, strong=True)
    head = message.head if isinstance(message, Manifest) else message
    if not isinstance(head, Parameters | ParametersHead):
        raise WireError("it is no version")
    return head.epoch, head.version, head.plan.attempt


def _head(message: Any) -> dict[str, Any]:
    """The header's fields: those of the head class only, in plain msgpack types."""
    word = _TYPES[type(message)]
    names = [f.name for f in fields(_HEADS[word])]
    return {"type": word} | {name: _plain(getattr(message, name)) for name in names}


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(inner) for name, inner in asdict(value).items()}
    return str(value) if isinstance(value, str) else value


def _model(model: ModelSpec) -> dict[str, Any]:
    table = [[t.name, list(t.shape), t.dtype, t.role.value] for t in model.tensors]
    return {"frozen": model.frozen, "tensors": table}


@cache
def _adapter(head_class: type) -> TypeAdapter[Any]:
    return TypeAdapter(head_class)


def _validated(head_class: type, values: Any) -> Any:
    try:
        return _adapter(head_class).validate_python(values)
    except ValidationError as error:
        where, what = first_problem(error)
        raise WireError(f"header field {where or head_class.__name__:.80}: {what}") from None


def _read_model(value: Any) -> ModelSpec:
    rows = value.get("tensors") if isinstance(value, dict) else None
    if not isinstance(value, dict) or value.keys() != {"frozen", "tensors"} or not isinstance(rows, tuple):
        raise WireError("the header does not describe a model")
    if not 0 < len(rows) <= MAX_TENSORS or not all(isinstance(row, tuple) and len(row) == 4 for row in rows):
        raise WireError("the table of tensors is empty or malformed")
    table = [dict(zip(("name", "shape", "dtype", "role"), row, strict=True)) for row in rows]
    model: ModelSpec = _validated(ModelSpec, {"frozen": value["frozen"], "tensors": table})
    if len({tensor.name for tensor in model.tensors}) != len(model.tensors):
        raise WireError("the table of tensors names one twice")
    return model


def _read_manifest(whole: Manifest, section: dict[str, Any], data: memoryview, *, strong: bool) -> Manifest:
    state, delta = section.pop("state", ""), section.pop("delta", None)
    if section.keys() != {"nbytes", "chunks"} or data.nbytes:
        raise WireError("the header does not describe chunks")
    if not isinstance(state, str) or (delta is not None and not state):
        raise WireError("a version that is told by deltas has a state")
    manifest = replace(
        whole,
        chunks=_chunk_list(section["chunks"], whole.nbytes),
        state=state,
        delta=None if delta is None else _read_delta(whole.model, delta),
    )
    sums = [*manifest.chunks, *(manifest.delta.chunks if manifest.delta is not None else ())]
    if strong and any(len(checksum) != STRONG for _, checksum in sums):
        raise WireError("a signed manifest whose checksums are none that a signature could stand for")
    return manifest


def _chunk_list(chunks: Any, nbytes: int) -> tuple[tuple[int, str], ...]:
    well_formed = isinstance(chunks, tuple) and all(
        isinstance(chunk, tuple) and len(chunk) == 2 and isinstance(chunk[0], int) and isinstance(chunk[1], str)
        for chunk in chunks
    )
    if not well_formed:
        raise WireError("the list of chunks is malformed")
    if any(size <= 0 for size, _ in chunks) or sum(size for size, _ in chunks) != nbytes:
        raise WireError("the chunks' sizes do not add up to the announced size")
    return chunks  # type: ignore[no-any-return]


def _read_delta(model: ModelSpec, value: Any) -> Delta:
    delta: Delta = _validated(Delta, value)
    expected = data_length(model, known_codec(delta.codec))
    if delta.nbytes != expected:
        raise WireError(f"a delta of {delta.nbytes} bytes; in this code it has {expected}")
    _chunk_list(delta.chunks, delta.nbytes)
    return delta
