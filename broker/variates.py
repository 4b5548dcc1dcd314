"""Control variates (SCAFFOLD): a second set of tensors that travels beside a model's own.

For each parameter there is a tensor that holds the sum of what the workers' variates are, and one number for how many
workers have one. An update carries by how much its worker's own has changed, and the aggregator adds that up, without
weights: so the sum is exact whatever order, staleness or number of updates, and workers that come later count from
their first update on. The mean, SCAFFOLD's c, is the sum divided by the number.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from broker.errors import ConfigError
from broker.model import DTYPES, Array, ModelSpec, TensorRole, Tensors, TensorSpec

__all__ = ["WORKERS", "has_variates", "like", "name_of", "variates_of", "with_variates", "without_variates", "zeros"]

PREFIX = "variate/"

#: The number of workers that have a variate.
WORKERS = f"{PREFIX}workers"

#: What the wire takes.
LONGEST = 256


def name_of(parameter: str) -> str:
    """The name of the variate of ``parameter``."""
    return f"{PREFIX}of/{parameter}"


def with_variates(model: ModelSpec) -> ModelSpec:
    """``model`` with variates behind its own tensors; float64 parameters have them in float64, others in float32.

    Raises :class:`ConfigError` if a name becomes too long.
    """
    own = tuple(
        TensorSpec(name_of(t.name), t.shape, "float64" if t.dtype == "float64" else "float32", TensorRole.VARIATE)
        for t in model.tensors
        if t.role is TensorRole.PARAMETER
    )
    for tensor in own:
        if len(tensor.name) > LONGEST:
            raise ConfigError(f"aggregator.control_variates: {tensor.name} is too long a name; shorten the parameter's")
    count = TensorSpec(WORKERS, (), "float64", TensorRole.VARIATE)
    return ModelSpec((*model.tensors, *own, count), model.frozen)


def has_variates(model: ModelSpec) -> bool:
    """Whether ``model`` comes with variates."""
    return any(tensor.role is TensorRole.VARIATE for tensor in model.tensors)


def like(own: ModelSpec, other: ModelSpec) -> ModelSpec:
    """``own`` with variates if ``other`` has some."""
    return with_variates(own) if has_variates(other) else own


def variates_of(model: ModelSpec) -> tuple[TensorSpec, ...]:
    """The variates among the tensors of ``model``."""
    return tuple(tensor for tensor in model.tensors if tensor.role is TensorRole.VARIATE)


def without_variates(tensors: Tensors) -> dict[str, Array]:
    """The tensors that are the model itself."""
    return {name: array for name, array in tensors.items() if not name.startswith(PREFIX)}


def zeros(model: ModelSpec) -> Mapping[str, Array]:
    """The variates of a run that begins."""
    return {tensor.name: np.zeros(tensor.shape, DTYPES[tensor.dtype]) for tensor in variates_of(model)}
