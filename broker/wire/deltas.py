"""Versions told by their difference from the one before, in a lossy code.

As in QAFeL (Ortega & Jafarkhani 2023, arXiv 2308.00263, algorithm 1). Aggregator and workers share a *state*: tensors
that both have bit for bit, and that follow the parameters without ever having to be equal to them. Version t's is

    s_t = s_(t-1) + Q(x_t - s_(t-1))

with parameters x and codec Q: what Q leaves out is in the next difference again, so errors do not add up. Workers
train from s_t, and evaluators evaluate it. A state is named by a hash over the name of the one before and what was
added, so whoever has missed one notices, and takes the whole state, which is there for every version: the difference
saves traffic to the workers, who are many, and not to the broker. An aggregator that has just begun tells s_t = x_t.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain

import numpy as np

from broker.codecs import applies, codec_of
from broker.errors import WireError
from broker.messages import (
    DTYPES,
    Array,
    Delta,
    Manifest,
    Parameters,
    ParametersHead,
    TensorSpec,
    Values,
    pieces,
    whole,
)
from broker.wire.chunks import Bodies, Chunks, part_size, section_from
from broker.wire.encoded import Encoded, compressed, known_codec
from broker.wire.messages import manifest_of, section_of
from broker.wire.section import Section
from broker.wire.tensors import blocks, data_length, read, spec_of

__all__ = ["Shared", "delta_range", "follow", "told_by_delta"]


@dataclass(frozen=True, slots=True)
class Shared:
    """Tensors that the aggregator and whoever followed it have, and their name."""

    tensors: Mapping[str, Values]
    state: str


class _Both(Bodies):
    """Two sequences, one after the other."""

    def __init__(self, first: Sequence[bytes], second: Sequence[bytes]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def body(self, index: int) -> bytes:
        return self._first[index] if index < len(self._first) else self._second[index - len(self._first)]


def told_by_delta(
    message: Parameters,
    of: str,
    before: Shared | None,
    codec: str,
    *,
    chunk_bytes: int,
    lossless: bool = False,
    strong: bool = False,
) -> tuple[Manifest, Sequence[bytes], Shared]:
    """Manifest and chunks of ``message``: its whole state, and how that differs from the one ``before``.

    The third is the state that whoever reads either of them has then; its arrays, which the chunks borrow, are new
    or, without one before, those of ``message``. ``strong``: checksums such as a signature can stand for.
    """
    size = part_size(chunk_bytes)
    if before is None:
        state = hashlib.sha256(f"{of} {message.digest}".encode()).hexdigest()
        chunks = Chunks(section_of(message), of, size, lossless=lossless, strong=strong)
        manifest = manifest_of(message, data_length(message.model), chunks.sums())
        return replace(manifest, state=state), chunks, Shared(message.tensors, state)
    seed = int.from_bytes(hashlib.sha256(before.state.encode()).digest()[:6], "big")
    difference = {spec.name: _difference(spec, message, before) for spec in message.model.tensors}
    encoded = compressed(message.model, difference, codec, seed)
    shared = {spec.name: _moved(spec, before.tensors[spec.name], encoded[spec.name]) for spec in message.model.tensors}
    whole_section = Section(blocks(message.model, shared))
    first = Chunks(whole_section, of, size, lossless=lossless, strong=strong)
    section = Section(blocks(message.model, encoded, codec_of(codec)))
    second = Chunks(section, of, size, lossless=lossless, first=len(first), strong=strong)
    delta = Delta(base=before.state, codec=codec, seed=seed, nbytes=section.nbytes, chunks=second.sums())
    manifest = replace(manifest_of(message, whole_section.nbytes, first.sums()), state=_state_after(delta), delta=delta)
    return manifest, _Both(first, second), Shared(shared, manifest.state)


def delta_range(manifest: Manifest) -> range:
    """Which of all chunks are the delta's; the others are the whole version's."""
    count = len(manifest.delta.chunks) if manifest.delta is not None else 0
    return range(len(manifest.chunks), len(manifest.chunks) + count)


def follow(manifest: Manifest, of: str, chunks: Iterable[bytes], before: Shared) -> Parameters:
    """The version that ``manifest`` tells of, from the chunks of its delta and the state before.

    Raises :class:`WireError` as :func:`broker.wire.join`, and if ``before`` is another state than the delta's base, or
    of another model.
    """
    delta, head = manifest.delta, manifest.head
    if delta is None or not isinstance(head, ParametersHead) or delta.base != before.state:
        raise WireError("a delta from a state that is not the one at hand")
    if manifest.state != _state_after(delta):
        raise WireError("a delta that does not lead to the state that is announced")
    if {t.name: (t.shape, t.dtype) for t in manifest.model.tensors} != {
        n: spec_of(v) for n, v in before.tensors.items()
    }:
        raise WireError("a delta of another model than the state that it starts from")
    section = section_from(delta.chunks, of, chunks, first=len(manifest.chunks))
    encoded = read(manifest.model, section, known_codec(delta.codec), delta.seed)
    tensors = {
        spec.name: _moved(spec, before.tensors[spec.name], encoded[spec.name]) for spec in manifest.model.tensors
    }
    facts = {f.name: getattr(head, f.name) for f in fields(ParametersHead)}
    return Parameters(**facts, model=manifest.model, tensors=tensors)


def _state_after(delta: Delta) -> str:
    text = " ".join(chain([delta.base], (checksum for _, checksum in delta.chunks)))
    return hashlib.sha256(text.encode()).hexdigest()


def _difference(spec: TensorSpec, message: Parameters, before: Shared) -> Values:
    """What a codec would encode; of what it does not apply to, the values themselves."""
    now, then = whole(message.tensors[spec.name]), whole(before.tensors[spec.name])
    if not applies(spec):
        return now
    return np.asarray(np.subtract(now, then, dtype=np.float32, casting="unsafe"))


def _moved(spec: TensorSpec, before: Values, change: Values) -> Values:
    """The state's next values. One rounding an element, so that both sides get the same bits."""
    if not isinstance(change, Encoded):
        return change
    old = whole(before).reshape(-1)
    result: Array = np.empty(old.size, DTYPES[spec.dtype])
    start = 0
    with np.errstate(over="ignore"):
        for piece in pieces(change):
            stop = start + piece.size
            np.add(old[start:stop], piece, out=result[start:stop], dtype=np.float32, casting="unsafe")
            start = stop
    result.flags.writeable = False
    return result.reshape(spec.shape)
