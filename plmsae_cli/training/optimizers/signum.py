"""Signum: the sign of a momentum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plmsae_cli.training.optimizers.base import Group, Optimizer, safe_gradient


class Signum(Optimizer):
    """m <- momentum m + (1 - momentum) g;  w <- (1 - rate weight_decay) w - rate sign(m).

    Bernstein et al. 2018 (arXiv 1802.04434, algorithm 2). One state tensor a parameter; a weight that never had a gradient
    stays where it is.
    """

    def __init__(self, groups: Sequence[Group], momentum: float) -> None:
        super().__init__(groups)
        self._beta = momentum
        self._momentum = {name: torch.zeros_like(p) for name, p in self._named.items()}

    def state_tensors(self) -> dict[str, Tensor]:
        """`<group>.<parameter>.momentum` -> the live tensor (not a copy)."""
        return {f"{name}.momentum": tensor for name, tensor in self._momentum.items()}

    def update(self, learning_rate: float, divisor: Tensor | None, skip: Tensor) -> None:
        for group, name, parameter, gradient in self._trained():
            rate = torch.where(skip, 0.0, learning_rate * group.lr_scale)
            m = self._momentum[name]
            m.lerp_(safe_gradient(gradient, divisor, skip, m), 1 - self._beta)
            parameter.mul_(1 - rate * group.weight_decay).sub_(rate * m.sign())
