"""A torch model as the tensors that travel: described, read, and loaded in place."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import ml_dtypes
import numpy as np
import torch
from torch import nn

from broker.errors import TaskError
from broker.messages import DTYPES, Array, ModelSpec, TensorRole, TensorSpec, Values, pieces, whole

__all__ = ["ModelState", "as_array"]

#: Buffers of these types are masks and packed constants: a mean of changes has no meaning for them.
LOCAL_BUFFERS = frozenset({torch.bool, torch.uint8})


class ModelState:
    """The travelling tensors of ``model``: trained parameters, then float and signed integer buffers.

    Float buffers are statistics and travel as values, integer buffers are counters and travel as changes (see
    ``broker.messages.TensorRole`` for why).

    What stays with the worker: frozen parameters (they enter ``spec.frozen`` as a digest), non-persistent
    buffers, and buffers of type bool or uint8. A tensor that several modules share appears once, under its
    first name, and stays shared.

    Args:
        model: as built.
        local: patterns of parameters and buffers that stay with the worker as well, like ``head.*``.

    Raises :class:`TaskError` if the model has nothing to train or a tensor that cannot travel, or if a pattern fits
    nothing.
    """

    def __init__(self, model: nn.Module, local: Sequence[str] = ()) -> None:
        self._model = model
        parameters = dict(model.named_parameters())
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        if not trained:
            raise TaskError("the model has no parameter that trains (requires_grad is False everywhere)")
        # state_dict knows which buffers are persistent; the modules' own list of the others is private.
        persistent = model.state_dict(keep_vars=True).keys()
        buffers = {name: b for name, b in model.named_buffers() if name in persistent and b.dtype not in LOCAL_BUFFERS}
        _refuse_overlaps(trained)
        self._local = _chosen((*trained, *buffers), local)
        if self._local:
            trained = {name: p for name, p in trained.items() if name not in self._local}
            buffers = {name: b for name, b in buffers.items() if name not in self._local}
            if not trained:
                raise TaskError("worker.local_parameters leaves nothing that could be trained together")
        self._parameters = tuple(trained)
        self._buffers = tuple(buffers)
        self.spec = ModelSpec(
            tensors=(
                *(_spec(name, p, TensorRole.PARAMETER) for name, p in trained.items()),
                *(_spec(name, b, _buffer_role(b)) for name, b in buffers.items()),
            ),
            frozen=_digest((name, p) for name, p in parameters.items() if not p.requires_grad),
        )

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the tensors that train."""
        return self._parameters

    def read(self, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Copies of the values of ``names`` (all, if None), in ``spec``'s order, shapes and dtypes."""
        tensors = self._tensors()
        return {name: as_array(tensors[name]).copy() for name in (tensors if names is None else names)}

    def load(self, tensors: Mapping[str, Values]) -> None:
        """Copy values into the model, in place, piece by piece. ``tensors`` fit ``spec``; they may be read-only."""
        with torch.no_grad():
            for name, target in self._tensors().items():
                _copy_into(target, tensors[name])

    def read_local(self) -> dict[str, Array]:
        """Copies of the values that stay with the worker."""
        return {name: as_array(tensor).copy() for name, tensor in self._local_tensors().items()}

    def load_local(self, values: Mapping[str, Array]) -> None:
        """Copy such values into the model, in place."""
        with torch.no_grad():
            for name, target in self._local_tensors().items():
                _copy_into(target, values[name])

    def change_since(self, old: Mapping[str, Values], names: Iterable[str] | None = None) -> dict[str, Array]:
        """New minus old value of each tensor in ``names`` (all, if None), in the tensor's own dtype."""
        now = self._tensors()
        result = {}
        # A model that diverged holds infinities; the aggregator judges that, a warning would say nothing.
        with np.errstate(all="ignore"):
            for name in now if names is None else names:
                result[name] = _difference(as_array(now[name]), old[name])
        return result

    def gradients(self) -> dict[str, Array]:
        """The ``.grad`` of each parameter that trains; zeros where it is None.

        Not copied: whoever trains on must set the gradients to None, as ``zero_grad`` does, not to zero.
        """
        now = self._tensors()
        result = {}
        for name in self._parameters:
            gradient = now[name].grad
            if gradient is None:
                spec = next(t for t in self.spec.tensors if t.name == name)
                result[name] = np.zeros(spec.shape, DTYPES[spec.dtype])
            else:
                result[name] = as_array(gradient.to_dense() if gradient.is_sparse else gradient)
        return result

    def buffers_since(self, old: Mapping[str, Values]) -> dict[str, Array]:
        """What an update says of the buffers: the values of statistics (copied), the changes of counters."""
        now = self._tensors()
        counters = [t.name for t in self.spec.tensors if t.role is TensorRole.COUNTER]
        statistics = [t.name for t in self.spec.tensors if t.role is TensorRole.STATISTIC]
        return {name: as_array(now[name]).copy() for name in statistics} | self.change_since(old, counters)

    def _local_tensors(self) -> dict[str, torch.Tensor]:
        every = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        return {name: every[name] for name in self._local}

    def _tensors(self) -> dict[str, torch.Tensor]:
        # Looked up each time: a module may assign a new tensor to a buffer's name while it runs.
        return {
            **{name: self._model.get_parameter(name) for name in self._parameters},
            **{name: self._model.get_buffer(name) for name in self._buffers},
        }


def as_array(tensor: torch.Tensor) -> Array:
    """``tensor``'s values as numpy, sharing its memory if it is contiguous and on the CPU."""
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype is torch.bfloat16:
        # numpy has no bfloat16 of its own; ml_dtypes reads the same bits.
        return plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: Array = plain.numpy()
    return array


def _chosen(names: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """Those of ``names`` that a pattern fits."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = ", ".join(names[:20])
            raise TaskError(f"worker.local_parameters: {pattern!r} fits nothing that trains; there are {known}")
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def _difference(new: Array, old: Values) -> Array:
    result = np.empty_like(new)
    for (start, stop), piece in _placed(old):
        np.subtract(new.reshape(-1)[start:stop], piece, out=result.reshape(-1)[start:stop])
    return result


def _placed(values: Values) -> Iterator[tuple[tuple[int, int], Array]]:
    """The pieces of ``values``, with where each begins and ends."""
    start = 0
    for piece in pieces(values):
        yield (start, start + piece.size), piece
        start += piece.size


def _copy_into(target: torch.Tensor, values: Values) -> None:
    plain = target.detach()
    if not plain.is_contiguous():
        # Such a tensor is not one stretch of memory that pieces could be put into.
        _copy_piece(plain, whole(values))
        return
    for (start, stop), piece in _placed(values):
        _copy_piece(plain.view(-1)[start:stop], piece)


def _copy_piece(target: torch.Tensor, values: Array) -> None:
    if target.device.type == "cpu":
        # Through numpy, because torch.from_numpy warns of read-only arrays, even if it only reads them.
        if target.dtype is torch.bfloat16:
            np.copyto(target.view(torch.int16).numpy(), values.view(np.int16))
        else:
            np.copyto(target.numpy(), values)
    elif target.dtype is torch.bfloat16:
        target.copy_(torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16))
    else:
        target.copy_(torch.from_numpy(values.copy()))


def _buffer_role(buffer: torch.Tensor) -> TensorRole:
    return TensorRole.COUNTER if not (buffer.is_floating_point() or buffer.is_complex()) else TensorRole.STATISTIC


def _spec(name: str, tensor: torch.Tensor, role: TensorRole) -> TensorSpec:
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        raise TaskError(f"{role} {name!r} has no values yet: run the lazy module once on a batch before returning it")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        advice = "split complex numbers with torch.view_as_real" if tensor.is_complex() else "convert it"
        if role is not TensorRole.PARAMETER:
            advice += ", or keep it with the worker by register_buffer(…, persistent=False)"
        raise TaskError(f"{role} {name!r} is of type {dtype}, which does not travel ({', '.join(DTYPES)} do): {advice}")
    return TensorSpec(name=name, shape=tuple(tensor.shape), dtype=dtype, role=role)


def _refuse_overlaps(parameters: dict[str, nn.Parameter]) -> None:
    """Two Parameter objects over the same memory would be moved twice by every version."""
    by_address: dict[int, list[str]] = defaultdict(list)
    for name, parameter in parameters.items():
        if not nn.parameter.is_lazy(parameter) and parameter.numel():
            by_address[parameter.data_ptr()].append(name)
    for address, names in by_address.items():
        if address and len(names) > 1:
            raise TaskError(
                f"parameters {' and '.join(names)} are different Parameter objects over the same memory: "
                "to tie weights, assign the same Parameter to both"
            )


def _digest(frozen: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, types, shapes and bytes; the empty string if there are none.

    Over bytes and not numpy arrays, because frozen weights may be of types that do not travel.
    """
    digest = None
    for name, tensor in frozen:
        digest = digest or hashlib.sha256()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest() if digest else ""
