"""Tensors as bytes: one canonical layout, so that nothing about positions has to be said or believed.

The tensors stand in the model's order, each at the next multiple of 64 bytes. Overlaps, holes and reorderings
cannot be expressed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xxhash

from broker.errors import ModelMismatch, WireError
from broker.messages import DTYPES, Array, ModelSpec, Tensors, as_bytes
from broker.wire.envelope import aligned

__all__ = ["blocks", "checksum", "data_length", "read", "spec_of"]


def spec_of(array: Array) -> tuple[tuple[int, ...], str]:
    """Shape and wire dtype of ``array``."""
    return tuple(array.shape), array.dtype.name


def data_length(model: ModelSpec) -> int:
    """Size in bytes of the data section that holds ``model``'s tensors."""
    position = 0
    for tensor in model.tensors:
        position = aligned(position) + tensor.nbytes
    return position


def blocks(model: ModelSpec, tensors: Tensors) -> list[memoryview]:
    """The bytes of ``tensors`` in ``model``'s order, not copied where they are contiguous.

    Raises :class:`ModelMismatch` if a tensor is missing, surplus, or of another shape or dtype.
    """
    wanted = {t.name: (t.shape, t.dtype) for t in model.tensors}
    given = {name: spec_of(array) for name, array in tensors.items()}
    if wanted != given:
        names = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        shown = "; ".join(f"{n}: expected {wanted.get(n, 'nothing')}, got {given.get(n, 'nothing')}" for n in names[:5])
        raise ModelMismatch(f"tensors do not fit the model: {shown}")
    result = []
    for tensor in model.tensors:
        array = tensors[tensor.name]
        if array.dtype.byteorder == ">":
            array = array.astype(DTYPES[tensor.dtype])
        result.append(as_bytes(array))
    return result


def read(model: ModelSpec, data: memoryview) -> dict[str, Array]:
    """Read-only arrays over ``data``, by name; no bytes are copied.

    Raises :class:`WireError` if ``data`` has another length than ``model`` says.
    """
    expected = data_length(model)
    if data.nbytes != expected:
        raise WireError(f"the tensors take {data.nbytes} bytes; the table describes {expected}")
    return dict(_views(model, data))


def _views(model: ModelSpec, data: memoryview) -> Iterator[tuple[str, Array]]:
    position = 0
    for tensor in model.tensors:
        position = aligned(position)
        flat = np.frombuffer(data[position : position + tensor.nbytes], dtype=np.uint8)
        try:
            array = flat.view(DTYPES[tensor.dtype]).reshape(tensor.shape)
        except ValueError as error:
            # Dimensions that no array has, beside a zero that makes their product small.
            raise WireError(f"{tensor.name}: {error}") from None
        array.flags.writeable = False
        yield tensor.name, array
        position += tensor.nbytes


def checksum(pieces: list[memoryview] | memoryview) -> str:
    """XXH3-128 over the data, as 32 hexadecimal digits: against damage, not against forgery."""
    state = xxhash.xxh3_128()
    for piece in [pieces] if isinstance(pieces, memoryview) else pieces:
        state.update(piece)
    return state.hexdigest()
