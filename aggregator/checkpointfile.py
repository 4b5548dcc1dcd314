"""What a checkpoint file looks like: a snapshot as one safetensors file, and back.

Any tool of the field can open it. Tensors are named ``parameters/…``, ``optimizer/<slot>/…``, ``accumulator/…``
and ``sketches``; everything else (ledger, epoch, partial round) is JSON in the file's metadata. ``checksum`` there
covers that JSON and the bytes of the tensors, ``layout`` their dtypes and shapes and the format.

``head`` covers the JSON alone, for those who do not read the tensors.

A strategy that needs all updates of a round keeps them beside the checkpoints (:mod:`aggregator.rowfile`); the JSON
names the files, and has a checksum for each update. One that is missing or damaged counts as damage of the checkpoint.

We write the format ourselves, since the library's ``save_file`` neither syncs nor streams (it would hold a second
copy of the model). The library checks what is read; the tensors we read ourselves, straight to where they stay, since
it would copy them out of a mapping of the file, and have each of them in memory twice.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import xxhash
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from aggregator.core.snapshot import Entry, Folds, Snapshot, SnapshotHead, VersionRecord
from aggregator.core.standing import Standing
from aggregator.optimizers import OptimizerState
from aggregator.rowfile import RowPart, StoredRows, open_rows
from aggregator.strategies.base import Accumulator
from broker.errors import CheckpointCorrupt, CheckpointError, CheckpointNotWritten
from broker.jsontext import from_json
from broker.messages import DTYPES, Array, ModelSpec, Scalar, Tensors, as_bytes

__all__ = ["ForeignCheckpoint", "contents", "read_checkpoint", "read_head", "row_files", "write_tensors"]

FORMAT = "fedmq-checkpoint-1"
FORMATS = r"fedmq-checkpoint-\d+"
#: The library's own limit.
MAX_HEADER = 100_000_000

_SAFETENSORS_DTYPES = {
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
}

_DTYPES = {theirs: DTYPES[ours] for ours, theirs in _SAFETENSORS_DTYPES.items()}

_ACCUMULATOR = "accumulator/"
#: Those of the partial round's updates, a row each.
_SKETCHES = "sketches"

#: Dtype, as the format calls it, and shape of each tensor.
_Layout = Mapping[str, tuple[str, tuple[int, ...]]]


class ForeignCheckpoint(CheckpointCorrupt):
    """Whole, but not for this release: falling back behind it would drop what was acknowledged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """A snapshot without its arrays."""

    # A field of a newer release must not get lost on the way through an older one.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    run: str
    model: ModelSpec
    epoch: int
    version: int
    digest: str
    optimizer_step: int
    optimizer_slots: tuple[str, ...]
    accumulator_share: float
    accumulator_weight: float
    accumulator_count: int
    entries: tuple[Entry, ...]
    ledger: dict[str, dict[str, list[list[int]]]]
    records: tuple[VersionRecord, ...]
    confirmed: dict[str, dict[str, int]]
    trainers: tuple[str, ...]
    rejected: dict[str, int]
    mode: str
    started: float
    done: bool
    # Not in the checkpoints of 0.1.
    void: tuple[tuple[int, int], ...] = ()
    changes: dict[str, Scalar] = field(default_factory=dict)
    pending: dict[str, Scalar] | None = None
    paused: bool = False
    commands: tuple[str, ...] = ()
    folds: Folds = ()
    kept_from: int | None = None
    accumulator_effort: float = 0.0
    recent: tuple[str, ...] = ()
    norms: tuple[float, ...] = ()
    """Of no worker in particular: from before ``worker_norms``, and not looked at any more."""
    worker_norms: dict[str, tuple[float, ...]] = field(default_factory=dict)
    standings: dict[str, Standing] = field(default_factory=dict)
    rows: tuple[RowPart, ...] | None = None
    """Updates of the open round, in files beside this one; None if their sums are all that is kept."""


_ADAPTER: TypeAdapter[_State] = TypeAdapter(_State)
_SHARED = {f.name for f in fields(SnapshotHead)}


def read_checkpoint(file: Path) -> Snapshot:
    """What stands in ``file``, checked. Takes the memory of the arrays that it returns, once.

    Raises:
        CheckpointCorrupt: torn, truncated or altered, or updates that it refers to are.
        ForeignCheckpoint: of a newer release.
        CheckpointError: the disk, or a right, does not let it be read; or it is not there any more.
    """
    with _clear_errors(file):
        metadata, layout = _described(file)
        arrays = _read_tensors(file, layout)
    is_whole = metadata.get("checksum") == _checksum(metadata.get("state", ""), arrays)
    state = _checked_state(file, metadata, layout, is_whole=is_whole)
    wanted = {f"parameters/{t.name}": (_SAFETENSORS_DTYPES[t.dtype], tuple(t.shape)) for t in state.model.tensors}
    if wanted != {name: kind for name, kind in layout.items() if name.startswith("parameters/")}:
        raise CheckpointCorrupt(f"{file}: its parameters are not those of its model, the file was altered or damaged")
    return _snapshot(state, arrays, _rows(file, state))


def read_head(file: Path) -> SnapshotHead:
    """What stands in ``file`` beside its tensors, which are not read: damage in them goes unnoticed.

    What it returns has its own checksum; a checkpoint of before that is taken as it is. Raises as
    :func:`read_checkpoint`.
    """
    state = _read_state(file)
    return SnapshotHead(**{name: getattr(state, name) for name in _SHARED})


def row_files(file: Path) -> frozenset[str]:
    """Names of the files beside ``file`` whose rows it refers to. Raises as :func:`read_checkpoint`."""
    return frozenset(part.file for part in _read_state(file).rows or ())


def _read_state(file: Path) -> _State:
    with _clear_errors(file):
        metadata, layout = _described(file)
    return _checked_state(file, metadata, layout, is_whole="state" in metadata)


def _rows(file: Path, state: _State) -> StoredRows | None:
    if state.rows is None:
        return None
    weights = [entry.weight for entry in state.entries]
    workers = [entry.id.worker for entry in state.entries]
    try:
        return open_rows(file.parent, state.model, state.rows, weights, workers)
    except FileNotFoundError as error:
        if file.exists():
            raise CheckpointCorrupt(f"{file}: {error.filename}, which it refers to, is missing") from None
        # Deleted with its rows since it was opened, as each newer one makes the oldest be.
        raise CheckpointError(f"{file} cannot be read: it was deleted meanwhile") from None


@contextmanager
def _clear_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # The disk or a right, not the file: an older generation must not take its place.
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, struct.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointCorrupt(f"{file} cannot be read: {error}") from None


def _described(file: Path) -> tuple[dict[str, str], _Layout]:
    """Metadata and layout; the library has looked whether the file has room for just these tensors."""
    with safe_open(file, framework="np") as content:
        parts = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118 (no mapping)
        layout = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
        return content.metadata() or {}, layout


def _read_tensors(file: Path, layout: _Layout) -> dict[str, Array]:
    """The tensors of a file that the library has opened."""
    arrays: dict[str, Array] = {}
    with file.open("rb") as content:
        (length,) = struct.unpack("<Q", content.read(8))
        header = from_json(content.read(length))
        for name in sorted(layout, key=lambda name: int(header[name]["data_offsets"][0])):
            dtype, shape = layout[name]
            if dtype not in _DTYPES:
                raise ValueError(f"{name} is of dtype {dtype}")
            arrays[name] = np.empty(shape, _DTYPES[dtype])
            content.seek(8 + length + int(header[name]["data_offsets"][0]))
            if content.readinto(as_bytes(arrays[name])) != arrays[name].nbytes:
                raise ValueError(f"it ends within {name}")
    return arrays


def _checked_state(file: Path, metadata: Mapping[str, str], layout: _Layout, *, is_whole: bool) -> _State:
    """The state in ``metadata``; ``is_whole`` says whether what was read beside it is what was written."""
    found, text = metadata.get("format", ""), metadata.get("state", "")
    # Earlier checkpoints have no ``head``, and those of 0.1 no ``layout``.
    is_whole = is_whole and metadata.get("head") in (None, _sum_of(text))
    if found != FORMAT and not is_whole and re.fullmatch(FORMATS, found):
        raise ForeignCheckpoint(f"{file}: format {found!r}, this release reads {FORMAT!r}: upgrade fedmq")
    is_whole = is_whole and metadata.get("layout") in (None, _layout_sum(layout))
    if not is_whole or found != FORMAT:
        raise CheckpointCorrupt(f"{file}: the checksum does not match, the file was altered or damaged")
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        raise ForeignCheckpoint(
            f"{file}: {error.error_count()} fields are not as this release expects: upgrade fedmq"
        ) from None


def contents(snapshot: Snapshot, rows: tuple[RowPart, ...] | None = None) -> tuple[dict[str, Array], dict[str, str]]:
    """The arrays and the metadata of ``snapshot``'s file, for :func:`write_tensors`. Arrays are borrowed.

    ``rows`` is how the file refers to those of the open round, which are durable.
    """
    arrays = _arrays(snapshot)
    state = _ADAPTER.dump_json(_state(snapshot, rows)).decode()
    layout = {name: (_SAFETENSORS_DTYPES[a.dtype.name], a.shape) for name, a in arrays.items()}
    sums = {"checksum": _checksum(state, arrays), "layout": _layout_sum(layout), "head": _sum_of(state)}
    return arrays, {"format": FORMAT, "state": state, **sums}


def write_tensors(
    file: BinaryIO, arrays: Tensors, metadata: Mapping[str, str], copied: Callable[[], None] | None = None
) -> None:
    """Write ``arrays`` to ``file`` in the safetensors format, without copying contiguous ones.

    Wider elements first, as the library does, so that each tensor is aligned to its element's size. The accumulator's
    are at least as wide as the parameters they are sums of, and first by name: it is read first.

    Args:
        file: written to, neither flushed nor synced.
        arrays: by name; read until this returns or raises.
        metadata: what stands beside them.
        copied: called as soon as the accumulator, if there is one in ``arrays``, is not read any more.
    """
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name in order:
        array = arrays[name]
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        # Better nothing acknowledged than a file that the library refuses to read.
        raise CheckpointNotWritten(f"the run's state takes {len(text)} bytes; safetensors reads up to {MAX_HEADER}")
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    lent = [name for name in order if name.startswith(_ACCUMULATOR)]
    for name in order:
        file.write(as_bytes(arrays[name]))
        if copied is not None and lent and name == lent[-1]:
            copied()


def _checksum(state: str, arrays: Tensors) -> str:
    digest = xxhash.xxh3_128(state.encode())
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(as_bytes(arrays[name]))
    return digest.hexdigest()


def _sum_of(state: str) -> str:
    return xxhash.xxh3_128(b"head" + state.encode()).hexdigest()


def _layout_sum(layout: _Layout) -> str:
    listed = [[name, dtype, list(shape)] for name, (dtype, shape) in sorted(layout.items())]
    return xxhash.xxh3_128(json.dumps([FORMAT, *listed]).encode()).hexdigest()


def _arrays(snapshot: Snapshot) -> dict[str, Array]:
    arrays = {f"parameters/{name}": array for name, array in snapshot.parameters.items()}
    for slot, tensors in snapshot.optimizer.slots.items():
        arrays |= {f"optimizer/{slot}/{name}": array for name, array in tensors.items()}
    if snapshot.accumulator.count:
        arrays |= {f"{_ACCUMULATOR}{name}": array for name, array in snapshot.accumulator.tensors.items()}
    if snapshot.sketches and snapshot.sketches[0].size:
        arrays[_SKETCHES] = np.stack(snapshot.sketches)
    return arrays


def _state(snapshot: Snapshot, rows: tuple[RowPart, ...] | None) -> _State:
    return _State(
        **{name: getattr(snapshot, name) for name in _SHARED},
        optimizer_step=snapshot.optimizer.step,
        optimizer_slots=tuple(snapshot.optimizer.slots),
        accumulator_share=snapshot.accumulator.share,
        accumulator_weight=snapshot.accumulator.weight,
        accumulator_count=snapshot.accumulator.count,
        accumulator_effort=snapshot.accumulator.effort,
        rows=rows,
    )


def _snapshot(state: _State, arrays: Mapping[str, Array], rows: StoredRows | None) -> Snapshot:
    def under(prefix: str) -> dict[str, Array]:
        return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}

    stored = under("parameters/")
    parameters = {t.name: stored[t.name] for t in state.model.tensors}
    for array in parameters.values():
        array.flags.writeable = False
    slots = {slot: under(f"optimizer/{slot}/") for slot in state.optimizer_slots}
    return Snapshot(
        **{name: getattr(state, name) for name in _SHARED},
        parameters=parameters,
        optimizer=OptimizerState(slots, state.optimizer_step),
        accumulator=Accumulator(
            tensors=under(_ACCUMULATOR),
            share=state.accumulator_share,
            weight=state.accumulator_weight,
            count=state.accumulator_count,
            effort=state.accumulator_effort,
            rows=rows,
        ),
        sketches=tuple(arrays[_SKETCHES]) if _SKETCHES in arrays else (),
    )
