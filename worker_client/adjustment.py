"""What is added to the gradient of each local step, where the run asks for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["Adjustment"]


class Adjustment:
    """Counts the steps of one training, and changes the gradient of each.

    The proximal term of FedProx (Li et al. 2020, arXiv 1812.06127, equation 2): the local objective is the loss plus
    ``proximal / 2 * ||w - w_base||^2``, so each gradient gets ``proximal * (w - w_base)``. Theirs may solve that to
    any precision; here it is as many steps as without.

    The shift of SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, equation 3): each gradient gets ``c - c_i``.

    Args:
        proximal: mu.
        base: the version's parameters by name, on the model's device; needed if ``proximal`` is not 0.
        shift: what is added to each gradient, likewise; None for nothing.
    """

    def __init__(
        self,
        proximal: float = 0.0,
        base: Mapping[str, Tensor] | None = None,
        shift: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.steps = 0
        """Calls so far."""
        self.proximal = proximal
        self._base = base or {}
        self._shift = shift or {}

    @property
    def is_needed(self) -> bool:
        """Whether training without it is another training than the run asks for."""
        return self.proximal != 0 or bool(self._shift)

    def __call__(self, model: nn.Module) -> None:
        """Change the gradients that stand in ``model``."""
        self.steps += 1
        if not self.is_needed:
            return
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.grad is not None and parameter.grad.is_sparse:
                    parameter.grad = parameter.grad.to_dense()
                # A parameter without a gradient has not moved, so nothing pulls it back; but it is shifted.
                if parameter.grad is not None and name in self._base:
                    parameter.grad.add_(parameter - self._base[name], alpha=self.proximal)
                if name in self._shift:
                    shift = self._shift[name]
                    parameter.grad = shift.clone() if parameter.grad is None else parameter.grad.add_(shift)
