"""What every update must fulfil before any rule looks at it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from broker.messages import Array, Mode, ModelSpec, Reason, TensorRole, Update, UpdateHead, Values, pieces

__all__ = ["NormLimits", "is_finite", "measured", "refusal"]

#: Of half precision: what the bits of infinity are, without the sign. Those of NaN are above. numpy's own isfinite
#: takes six to ten times as long.
_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80}
_PIECE = 1 << 18


def refusal(
    update: UpdateHead,
    claimed: ModelSpec,
    *,
    run: str,
    model: ModelSpec,
    mode: Mode,
    epoch: int,
    version: int,
    void: tuple[tuple[int, int], ...] = (),
    needs_effort: bool = False,
    max_examples: int | None = None,
) -> tuple[Reason, str] | None:
    """Why ``update`` cannot be used at all by ``run`` at ``version``, or None; its values aside.

    ``claimed`` is the model that it says it is of; ``void`` holds the versions that were taken back, as first and
    last; ``needs_effort`` says that the strategy cannot do without knowing how much the worker did; ``max_examples`` is
    what is believed at most.
    """
    refused = None
    if update.run != run:
        refused = Reason.WRONG_RUN, f"it belongs to run {update.run!r}; this is {run!r}"
    elif update.mode is not mode:
        refused = Reason.WRONG_MODE, f"it carries a {update.mode}; this run takes a {mode}"
    elif claimed != model:
        refused = Reason.MODEL_MISMATCH, "; ".join(model.differences(claimed, theirs="the update")[:3])
    elif update.examples < 1:
        refused = Reason.NO_EXAMPLES, "no examples stand behind it"
    elif max_examples is not None and update.examples > max_examples:
        detail = f"it claims {update.examples} examples; aggregator.max_examples is {max_examples}"
        refused = Reason.TOO_MANY_EXAMPLES, detail
    elif needs_effort and update.effort < 1:
        refused = (
            Reason.NOT_SUPPORTED,
            f"an effort of {update.effort}; strategy fednova needs the number of local steps",
        )
    elif update.base_version > version or update.base_epoch > epoch:
        started = f"it starts from version {update.base_version} of epoch {update.base_epoch}"
        refused = Reason.FUTURE_VERSION, f"{started}; the newest is {version} of epoch {epoch}"
    elif any(first <= update.base_version <= last for first, last in void):
        refused = Reason.ROLLED_BACK, f"version {update.base_version}, from which it starts, was taken back"
    return refused


@dataclass(frozen=True, slots=True)
class NormLimits:
    """How long an update may be: the Euclidean norm of all its parameters together."""

    most: float | None = None
    """At most so much; None for any."""
    factor: float | None = None
    """At most so many times the median of the updates taken last; None for any."""

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return self.most is not None or self.factor is not None

    def refusal(self, norm: float, median: float | None) -> tuple[Reason, str] | None:
        """Why an update of this norm is not taken, or None.

        Args:
            norm: its own.
            median: that of the updates taken last; None if there are too few.
        """
        if self.most is not None and norm > self.most:
            return Reason.NORM_TOO_LARGE, f"its norm is {norm:.4g}; aggregator.max_norm is {self.most:g}"
        if self.factor is not None and median is not None and norm > self.factor * median:
            usual = f"{norm / median if median else math.inf:.3g} times the median of the last ones, {median:.4g}"
            return Reason.NORM_UNUSUAL, f"its norm is {norm:.4g}, {usual}; aggregator.norm_factor is {self.factor:g}"
        return None


def measured(update: Update, *, needs_norm: bool) -> float | tuple[Reason, str] | None:
    """The norm of ``update``'s parameters, or why its values cannot be used.

    The sum of squares that says whether float32 and float64 are finite is the norm's as well. Where that is found
    otherwise, as in half precision or in codes that cannot hold anything else, the values are read once more, and
    only if ``needs_norm``; None if not.
    """
    squares: float | None = 0.0
    for tensor in update.model.tensors:
        values = update.tensors[tensor.name]
        counts = tensor.role is TensorRole.PARAMETER
        found = _squares(values, needs_sum=needs_norm and counts)
        if found is not None and not math.isfinite(found):
            return Reason.NOT_FINITE, f"{tensor.name} holds NaN or infinity"
        if counts:
            squares = None if squares is None or found is None else squares + found
    return None if squares is None else math.sqrt(squares)


def _squares(values: Values, *, needs_sum: bool) -> float | None:
    """The sum of squares of all elements; NaN or infinity if they are not finite, None if it is not known."""
    is_known_finite = bool(getattr(values, "is_finite", False))
    if is_known_finite and not needs_sum:
        return None
    total: float | None = 0.0
    for piece in pieces(values):
        flat = piece.reshape(-1)
        if flat.dtype in (np.float32, np.float64):
            part: float | None = _dot(flat)
        elif not is_finite(flat):
            return math.nan
        else:
            part = _widened(flat) if needs_sum else None
        total = None if total is None or part is None else total + part
    return total


def _dot(flat: Array) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(flat, flat))


def _widened(flat: Array) -> float:
    """The sum of squares of elements that are of no use for arithmetic."""
    parts = (flat[start : start + _PIECE].astype(np.float32) for start in range(0, flat.size, _PIECE))
    return math.fsum(_dot(part) for part in parts)


def is_finite(array: Array) -> bool:
    """Whether all elements are finite, and small enough to be added up.

    For float32 and float64 that is whether the dot product with itself is finite, which takes an eighteenth of
    the time of ``isfinite``. It overflows for elements beyond 1e19 (1e154): no update of use has them, and sums
    of such would stop the run.
    """
    if array.dtype.kind in "iub":
        return True
    flat = array.reshape(-1)
    if array.dtype in (np.float32, np.float64):
        return math.isfinite(_dot(flat))
    bits, limit = flat.view("<u2"), _INFINITY[array.dtype.name]
    # Piece by piece: the results for a whole tensor would take as much as the tensor.
    return all(
        int(np.bitwise_and(bits[start : start + _PIECE], 0x7FFF).max()) < limit for start in range(0, flat.size, _PIECE)
    )
