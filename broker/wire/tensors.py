"""Tensors as bytes: one canonical layout, so that nothing about positions has to be said or believed.

The tensors stand in the model's order, each at the next multiple of 64 bytes. Overlaps, holes and reorderings
cannot be expressed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import xxhash

from broker.codecs import Codec, applies
from broker.errors import ModelMismatch, WireError
from broker.messages import DTYPES, Array, ModelSpec, Values, as_bytes, pieces, whole
from broker.wire.encoded import Encoded, planes_of
from broker.wire.envelope import aligned
from broker.wire.section import Section

__all__ = ["STRONG", "blocks", "checksum", "data_length", "matches", "read", "spec_of"]

#: Digits of a checksum that nobody can forge.
STRONG = 64


def spec_of(array: Values) -> tuple[tuple[int, ...], str]:
    """Shape and wire dtype of ``array``."""
    return tuple(array.shape), array.dtype.name


def data_length(model: ModelSpec, codec: Codec | None = None) -> int:
    """Size in bytes of the data section that holds ``model``'s tensors, in ``codec``."""
    position = 0
    for tensor in model.tensors:
        for plane in planes_of(tensor, codec):
            position = aligned(position) + plane.nbytes
    return position


def blocks(model: ModelSpec, tensors: Mapping[str, Values], codec: Codec | None = None) -> list[memoryview]:
    """The data section of ``tensors`` in ``model``'s order: their bytes, not copied where they are contiguous.

    With ``codec``, those that it applies to must be :class:`Encoded`.

    Raises :class:`ModelMismatch` if a tensor is missing, surplus, or of another shape or dtype.
    """
    wanted = {t.name: (t.shape, t.dtype) for t in model.tensors}
    given = {name: spec_of(array) for name, array in tensors.items()}
    if wanted != given:
        names = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        shown = "; ".join(f"{n}: expected {wanted.get(n, 'nothing')}, got {given.get(n, 'nothing')}" for n in names[:5])
        raise ModelMismatch(f"tensors do not fit the model: {shown}")
    result: list[memoryview] = []
    position = 0
    for tensor in model.tensors:
        values = tensors[tensor.name]
        planes: Sequence[Values] = values.planes if isinstance(values, Encoded) else [values]
        for spec, plane in zip(planes_of(tensor, codec), planes, strict=True):
            if padding := aligned(position) - position:
                result.append(memoryview(bytes(padding)))
            position = aligned(position) + spec.nbytes
            result += [_bytes_of(piece, spec.dtype) for piece in pieces(plane)]
    return result


def _bytes_of(array: Array, dtype: str) -> memoryview:
    return as_bytes(array.astype(DTYPES[dtype]) if array.dtype.byteorder == ">" else array)


def read(model: ModelSpec, section: Section, codec: Codec | None = None, seed: int = 0) -> dict[str, Values]:
    """The tensors in ``section`` by name, read-only; no bytes are copied, but for planes that lie in several parts.

    Raises :class:`WireError` if ``section`` has another length than ``model`` says, cuts an element in two, or holds
    planes that no encoder gives.
    """
    expected = data_length(model, codec)
    if section.nbytes != expected:
        raise WireError(f"the tensors take {section.nbytes} bytes; the table describes {expected}")
    result: dict[str, Values] = {}
    position = 0
    for tensor in model.tensors:
        planes: list[Values] = []
        for spec in planes_of(tensor, codec):
            position = aligned(position)
            planes.append(section.tensor(spec, position))
            position += spec.nbytes
        is_encoded = codec is not None and applies(tensor)
        result[tensor.name] = Encoded(tensor, codec, [whole(p) for p in planes], seed) if is_encoded else planes[0]  # type: ignore[arg-type]
    return result


def checksum(pieces: Iterable[memoryview] | memoryview, *, strong: bool = False) -> str:
    """XXH3-128 over the data, as 32 hexadecimal digits: against damage, not against forgery.

    ``strong``: SHA-256, 64 digits, against both, where a signature stands over it; it takes ten times as long.
    """
    state = hashlib.sha256() if strong else xxhash.xxh3_128()
    for piece in [pieces] if isinstance(pieces, memoryview) else pieces:
        state.update(piece)
    return state.hexdigest()


def matches(data: memoryview, announced: object, *, strong: bool = False) -> bool:
    """Whether ``announced`` is the :func:`checksum` of ``data``, of either kind; with ``strong`` of that one."""
    if not isinstance(announced, str) or (strong and len(announced) != STRONG):
        return False
    return checksum(data, strong=len(announced) == STRONG) == announced
