"""The tensors of a model as both sides know them: their types, their description, their bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Annotated, Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, ConfigDict, Field, Strict, with_config

from broker.errors import ModelMismatch

__all__ = [
    "DTYPES",
    "Array",
    "Count",
    "DType",
    "ModelSpec",
    "Pieces",
    "TensorRole",
    "TensorSpec",
    "Tensors",
    "Values",
    "as_bytes",
    "parameters_digest",
    "pieces",
    "strict",
    "whole",
]

Array = NDArray[Any]


@runtime_checkable
class Pieces(Protocol):
    """A tensor that is not in one place: spread over chunks, or still encoded. Goes where an array would."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """As of an array."""

    @property
    def is_finite(self) -> bool:
        """Whether all elements are finite by the way in which they are written; False if that is not known."""

    def pieces(self) -> Iterator[Array]:
        """The elements in C order as flat read-only arrays, one after the other, each valid until the next.

        Raises :class:`WireError` if there is something else than the elements that were announced.
        """


Values = Array | Pieces
Tensors = Mapping[str, Array]

Count = Annotated[int, Strict(), Field(ge=0, le=2**53)]

#: Element types that may travel, by the name that stands on the wire. All little-endian.
DTYPES: Mapping[str, np.dtype[Any]] = {
    **{
        name: np.dtype(name).newbyteorder("<")
        for name in ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8")
    },
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def _known_dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} does not travel; known are {', '.join(DTYPES)}")
    return name


DType = Annotated[str, Strict(), AfterValidator(_known_dtype)]

# Unknown keys are refused, not ignored: a reader that does not know a field cannot know what it changes.
strict = with_config(ConfigDict(extra="forbid"))


class TensorRole(StrEnum):
    """How the aggregator treats a tensor."""

    PARAMETER = "parameter"
    """Trained: the server optimiser moves it."""
    STATISTIC = "statistic"
    """A floating-point buffer that training changes as a side effect, like batch norm's running variance. An
    update carries its *value*, and the mean of the values replaces it: changes of a variance from different
    base versions, added up, could make it negative."""
    COUNTER = "counter"
    """An integer buffer. An update carries its change, and the mean of the changes is added, rounded."""
    VARIATE = "variate"
    """A sum over workers (``broker.variates``). An update carries the change of its worker's part, which is added as it
    is, without weights."""


@strict
@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape, dtype and role of one tensor of a model."""

    name: Annotated[str, Strict(), Field(min_length=1, max_length=256)]
    shape: Annotated[tuple[Count, ...], Field(max_length=16)]
    dtype: DType
    role: TensorRole = TensorRole.PARAMETER

    @property
    def nbytes(self) -> int:
        """Size in bytes, in Python's unbounded integers."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)} {self.role}"


@strict
@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The tensors of a run's model that travel, in their fixed order.

    ``frozen`` is a digest over the parameters that do not train and therefore stay with the workers; all
    workers of a run must have the same.
    """

    tensors: tuple[TensorSpec, ...]
    frozen: Annotated[str, Strict(), Field(pattern=r"^([0-9a-f]{64})?$")] = ""

    @property
    def nbytes(self) -> int:
        """Size in bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def digest(self) -> str:
        """SHA-256 over the whole description, as 64 hexadecimal digits."""
        facts = [[t.name, list(t.shape), t.dtype, t.role.value] for t in self.tensors]
        return hashlib.sha256(json.dumps([facts, self.frozen]).encode()).hexdigest()

    def differences(self, other: ModelSpec, *, ours: str = "the run", theirs: str = "this model") -> list[str]:
        """Each difference as a line; the empty list if the two are the same."""
        mine = {t.name: t for t in self.tensors}
        yours = {t.name: t for t in other.tensors}
        lines = [f"{name}: only {ours} has it ({mine[name]})" for name in mine if name not in yours]
        lines += [f"{name}: only {theirs} has it ({yours[name]})" for name in yours if name not in mine]
        lines += [
            f"{name}: {ours} has {mine[name]}, {theirs} has {yours[name]}"
            for name in mine
            if name in yours and mine[name] != yours[name]
        ]
        if not lines and [t.name for t in self.tensors] != [t.name for t in other.tensors]:
            lines.append("the same tensors, in another order")
        if not lines and self.frozen != other.frozen:
            lines.append(
                f"the frozen parameters: {ours} has {self.frozen[:12] or 'none'}, {theirs} has "
                f"{other.frozen[:12] or 'none'} (digests; load them from the same file on every worker)"
            )
        return lines

    def require_same(self, other: ModelSpec, *, ours: str = "the run", theirs: str = "this model") -> None:
        """Raise :class:`ModelMismatch` that shows where ``other`` differs, if it does."""
        lines = self.differences(other, ours=ours, theirs=theirs)
        if lines:
            shown = "\n  ".join(lines[:10]) + (f"\n  … and {len(lines) - 10} more" if len(lines) > 10 else "")
            raise ModelMismatch(f"{theirs} differs from {ours}'s model:\n  {shown}")


def parameters_digest(tensors: Mapping[str, Values]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of ``tensors`` in their order, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, values in tensors.items():
        digest.update(f"{name}\0{values.dtype.name}\0{list(values.shape)}\0".encode())
        for piece in pieces(values):
            digest.update(as_bytes(piece))
    return digest.hexdigest()


def pieces(values: Values) -> Iterator[Array]:
    """The elements of ``values`` in C order, as flat arrays one after the other; an array's are one."""
    if isinstance(values, np.ndarray | np.generic):
        yield np.asarray(values).reshape(-1)
    else:
        yield from values.pieces()


def whole(values: Values) -> Array:
    """``values`` as one array; copied if it is in pieces, which all have the same dtype then."""
    if isinstance(values, np.ndarray | np.generic):
        return np.asarray(values)
    parts = [piece.copy() for piece in values.pieces()]
    return (np.concatenate(parts) if parts else np.empty(0, values.dtype)).reshape(values.shape)


def as_bytes(array: Array) -> memoryview:
    """The bytes of ``array`` in C order, without a copy if it is contiguous."""
    # uint8 first: a memoryview cannot be made of dtypes that the buffer protocol does not know (bfloat16).
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # type: ignore[arg-type]
