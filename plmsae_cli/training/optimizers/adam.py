"""Adam with float32 moments, by torch's fused update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plmsae_cli.training.optimizers.base import Group, Optimizer


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015) over named groups; AdamW where a group has `weight_decay`.

    Uses torch's fused update, which on CPU and CUDA alike reads and writes each tensor once.
    """

    def __init__(self, groups: Sequence[Group], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups)
        self._adam: Any = torch.optim.Adam(
            [{"params": list(group.parameters.values()), "weight_decay": group.weight_decay} for group in groups],
            betas=betas,
            eps=eps,
            fused=True,
            decoupled_weight_decay=True,
        )
        for parameter in self._named.values():
            self._adam.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def update(self, learning_rate: float, divisor: Tensor | None, skip: Tensor) -> None:
        # The hooks for loss scaling: the fused update divides by the one, and rests where the other is 1.
        self._adam.grad_scale = divisor
        self._adam.found_inf = skip.float()
        for options, group in zip(self._adam.param_groups, self._groups, strict=True):
            options["lr"] = learning_rate * group.lr_scale
        self._adam.step()

    def state_tensors(self) -> dict[str, Tensor]:
        """`<group>.<parameter>.<step | exp_avg | exp_avg_sq>` -> the live tensor (not a copy)."""
        return {
            f"{name}.{key}": tensor
            for name, parameter in self._named.items()
            for key, tensor in self._adam.state[parameter].items()
        }
