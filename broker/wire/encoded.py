"""Tensors that travel in a lossy code: which planes stand where, and the values read out of them piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from broker.codecs import CODECS, Codec, applies, codec_of
from broker.errors import ConfigError, FedmqError, WireError
from broker.messages import DTYPES, Array, ModelSpec, TensorSpec, Values, pieces

__all__ = ["Encoded", "compressed", "known_codec", "planes_of"]


class Encoded:
    """A tensor in a codec's planes; see :class:`broker.messages.Pieces`. Its pieces are float32, whatever its dtype."""

    def __init__(self, spec: TensorSpec, codec: Codec, planes: Sequence[Array], seed: int) -> None:
        """Raises :class:`WireError` for planes that no encoder gives."""
        self.shape = spec.shape
        self.dtype: np.dtype[Any] = DTYPES[spec.dtype]
        self.planes = planes
        self._codec, self._seed = codec, seed
        # Ours have no way to write NaN or infinity. Of those of others that is looked at.
        self.is_finite = codec.name.partition(":")[0] in CODECS.own
        try:
            self.pieces()
        except FedmqError:
            raise
        except Exception as error:
            raise WireError(f"codec {codec.name} raised {type(error).__name__}: {error}") from error

    def pieces(self) -> Iterator[Array]:
        """The decoded elements in C order, as flat float32 arrays."""
        return self._codec.pieces(self.planes, prod(self.shape), self._seed)


def planes_of(spec: TensorSpec, codec: Codec | None) -> list[TensorSpec]:
    """What stands in the data section for the tensor ``spec``: itself, or the codec's planes."""
    if codec is None or not applies(spec):
        return [spec]
    return [TensorSpec(spec.name, (count,), dtype) for dtype, count in codec.layout(prod(spec.shape))]


def compressed(model: ModelSpec, tensors: Mapping[str, Values], codec: str, seed: int) -> dict[str, Values]:
    """``tensors`` with those that ``codec`` applies to encoded, for an :class:`Update` that names it and ``seed``.

    Raises :class:`ConfigError` for an unknown codec.
    """
    coder = codec_of(codec)
    return {spec.name: _encoded(spec, tensors[spec.name], coder, seed) for spec in model.tensors}


def _encoded(spec: TensorSpec, values: Values, codec: Codec, seed: int) -> Values:
    if not applies(spec):
        return values
    flat = np.concatenate([piece.astype(np.float32, copy=False) for piece in pieces(values)])
    return Encoded(spec, codec, codec.encode(flat, seed), seed)


def known_codec(text: object) -> Codec:
    """The codec that a message names. Raises :class:`WireError`."""
    try:
        return codec_of(text if isinstance(text, str) else repr(text)[:80])
    except ConfigError as error:
        raise WireError(f"an unknown codec: {error}") from None
