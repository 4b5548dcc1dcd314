"""``fedmq compress``: what each codec would make of a model's tensors, in bytes, error and speed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table as Grid
from safetensors import SafetensorError, safe_open

from broker.codecs import MIN_ELEMENTS, Codec, applies, codec_of
from broker.console import JsonOption, VerboseOption, bar, guard, say, say_table, set_up_logging
from broker.errors import ConfigError
from broker.messages import Array, TensorSpec

__all__ = ["compress"]

DEFAULTS = ("bf16", "fp16", "int8", "eden:4", "eden:3", "eden:2", "eden:1", "topk:0.1", "topk:0.01")

#: What codecs are for, by the names of the file format.
FLOATING = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

SEED = 0


@dataclass(slots=True)
class Score:
    """What came of one codec, summed over tensors: bytes, squares, and seconds of this thread's CPU time."""

    codec: Codec
    nbytes: int = 0
    square: float = 0.0
    error: float = 0.0
    product: float = 0.0
    result: float = 0.0
    encoding: float = 0.0
    decoding: float = 0.0

    def add(self, values: Array) -> None:
        """Encode and decode ``values`` (flat float32), a piece at a time."""
        started = time.thread_time()
        planes = self.codec.encode(values, SEED)
        decoding = time.thread_time()
        self.encoding += decoding - started
        self.nbytes += sum(plane.nbytes for plane in planes)
        position = 0
        for piece in self.codec.pieces(planes, values.size, SEED):
            self.decoding += time.thread_time() - decoding
            self._compare(values[position : position + piece.size], piece)
            position += piece.size
            decoding = time.thread_time()

    def _compare(self, values: Array, decoded: Array) -> None:
        exact, result = values.astype(np.float64), decoded.astype(np.float64)
        self.square += float(exact @ exact)
        self.product += float(exact @ result)
        self.result += float(result @ result)
        result -= exact
        self.error += float(result @ result)

    def plain(self, selection: Selection) -> dict[str, Any]:
        """For ``--json``. A figure that cannot be had, of a model of zeros, is None."""
        elements = selection.elements
        return {
            "codec": self.codec.name,
            "bytes": self.nbytes,
            "bytes_per_value": self.nbytes / elements,
            "ratio": selection.nbytes / self.nbytes,
            "vnmse": _quotient(self.error, self.square),
            "cosine": _quotient(self.product, sqrt(self.square) * sqrt(self.result)),
            "encode_gb_s": _quotient(4 * elements / 1e9, self.encoding),
            "decode_gb_s": _quotient(4 * elements / 1e9, self.decoding),
        }


@dataclass(frozen=True, slots=True)
class Selection:
    """The tensors of a file that codecs are for, and how many there are in all."""

    tensors: tuple[TensorSpec, ...]
    count: int

    @property
    def nbytes(self) -> int:
        """As they stand in the file."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def elements(self) -> int:
        """How many values."""
        return sum(prod(tensor.shape) for tensor in self.tensors)


def compress(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A safetensors file, like a run's model.safetensors.")],
    *,
    codec: Annotated[
        list[str] | None,
        typer.Option("--codec", metavar="NAME", help=f"Repeatable; if not given: {', '.join(DEFAULTS)}."),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Show what each codec makes of a model's tensors: bytes, error, and GB of float32 a second on one core.

    The error is vNMSE, the square of what is lost in relation to that of the tensors. Tensors to which codecs do not
    apply, those that are small or hold whole numbers, are left out. With bf16 and eden the error of an update is much
    the same; topk makes sense for updates only.

    Example: fedmq compress runs/digits/model.safetensors --codec int8 --codec eden:4
    """
    with guard():
        set_up_logging(verbose)
        scores = [Score(codec_of(name)) for name in dict.fromkeys(codec or DEFAULTS)]
        with _opened(file) as content:
            selection = _selection(file, content)
            _measure(file, content, selection, scores)
        rows = [score.plain(selection) for score in scores]
        if as_json:
            chosen = {"chosen": len(selection.tensors), "values": selection.elements, "bytes": selection.nbytes}
            say(json.dumps({"file": str(file), "tensors": selection.count, **chosen, "codecs": rows}, indent=2))
        else:
            _show(selection, rows)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Raises :class:`ConfigError` if ``file`` is not there or not what it should be, also while it is read."""
    try:
        with safe_open(file, framework="np") as content:
            yield content
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}; give the path of a model file") from None
    except SafetensorError as error:
        raise ConfigError(
            f"{file} is no safetensors file: {error}; a run's model is runs/RUN/model.safetensors"
        ) from None


def _selection(file: Path, content: Any) -> Selection:
    names = content.keys()
    parts = ((name, content.get_slice(name)) for name in names)
    specs = [
        TensorSpec(name, tuple(part.get_shape()), FLOATING[part.get_dtype()])
        for name, part in parts
        if part.get_dtype() in FLOATING
    ]
    selection = Selection(tuple(filter(applies, specs)), len(names))
    if not selection.tensors:
        raise ConfigError(
            f"nothing to compress in {file}: codecs are for floating-point tensors of at least {MIN_ELEMENTS} values, "
            f"and none of its {selection.count} is one"
        )
    return selection


def _measure(file: Path, content: Any, selection: Selection, scores: list[Score]) -> None:
    with bar("compressing", total=selection.elements * len(scores), unit="values") as advance:
        for tensor in selection.tensors:
            _measure_one(_values(file, content, tensor.name), scores, advance)


def _measure_one(values: Array, scores: list[Score], advance: Callable[[int], object]) -> None:
    """In a function of its own, so that no tensor is kept while the next is read."""
    for score in scores:
        score.add(values)
        advance(values.size)


def _values(file: Path, content: Any, name: str) -> Array:
    with np.errstate(over="ignore"):
        values = np.asarray(content.get_tensor(name)).reshape(-1).astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise ConfigError(f"{file}: tensor {name!r} holds values that are not finite; no codec is for such a model")
    return values


def _show(selection: Selection, rows: list[dict[str, Any]]) -> None:
    say(
        f"{len(selection.tensors):,} of {selection.count:,} tensors, {selection.elements:,} values, "
        f"{selection.nbytes:,} bytes; the others travel as they are"
    )
    table = Grid(box=None, pad_edge=False, header_style="bold")
    table.add_column("codec", no_wrap=True)
    for name in ("bytes", "a value", "ratio", "vNMSE", "cosine", "encode GB/s", "decode GB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            escape(row["codec"]),
            f"{row['bytes']:,}",
            f"{row['bytes_per_value']:.3f}",
            f"{row['ratio']:.1f}",
            _number(row["vnmse"], ".2e"),
            _number(row["cosine"], ".4f"),
            _number(row["encode_gb_s"], ".2f"),
            _number(row["decode_gb_s"], ".2f"),
        )
    say_table(table)


def _quotient(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
