"""Tensors that a worker keeps in its folder from one life to the next."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from broker.messages import Array, Values, pieces

__all__ = ["is_finite", "keep", "kept", "put"]

log = logging.getLogger("fedmq.worker")


def keep(file: Path, tensors: Mapping[str, Array], facts: Mapping[str, str], *, durable: bool = False) -> None:
    """Put ``tensors``, and ``facts`` about them, into ``file``, in place of what was there: all, or nothing.

    Args:
        file: where; ending in ``.safetensors``.
        tensors: of types that numpy has itself.
        facts: as text.
        durable: wait until it would survive a power cut.

    Raises :class:`OSError` if it cannot be written.
    """
    temporary = file.with_suffix(".tmp")
    try:
        save_file(dict(tensors), temporary, metadata=dict(facts))
    except SafetensorError as error:
        raise OSError(f"{temporary} cannot be written: {error}") from None
    if durable:
        _sync(temporary, os.O_RDONLY)
    temporary.replace(file)
    if durable:
        _sync(file.parent, os.O_RDONLY | os.O_DIRECTORY)


def kept(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Array], dict[str, str]] | None:
    """What :func:`keep` put there; None if there is no such file, or, with a warning, if it is not usable.

    Args:
        file: where.
        shapes: names and shapes that the tensors must have; they must be numbers, and finite.
    """
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="np") as content:
            facts = dict(content.metadata() or {})
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        log.warning("%s cannot be read, so it is begun anew: %s", file, error)
        return None
    fits = {name: array.shape for name, array in tensors.items()} == dict(shapes)
    if fits and all(array.dtype.kind in "fiu" and is_finite(array) for array in tensors.values()):
        return tensors, facts
    log.warning("%s is of another model, and not used", file)
    return None


def put(file: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Put ``parts`` into ``file``, in place of what was there, so that it survives a power cut: all, or nothing.

    Raises :class:`OSError` if it cannot be written.
    """
    temporary = file.with_suffix(".tmp")
    with temporary.open("wb") as content:
        content.writelines(parts)
        content.flush()
        os.fsync(content.fileno())
    temporary.replace(file)
    _sync(file.parent, os.O_RDONLY | os.O_DIRECTORY)


def is_finite(values: Values) -> bool:
    """Whether there is neither NaN nor infinity in ``values``."""
    return all(piece.dtype.kind in "iub" or bool(np.isfinite(piece).all()) for piece in pieces(values))


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
