"""Adam with float32 moments, by torch's fused update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

from plmsae_cli.training.optimizers.base import Group, Optimizer


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015) over named groups; AdamW where a group has `weight_decay`.

    Uses torch's fused update, which on CPU and CUDA alike reads and writes each tensor once. As a function: to make an
    optimiser of torch's class imports its compiler, two seconds of each rank.
    """

    def __init__(self, groups: Sequence[Group], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups)
        self._betas, self._eps = betas, eps
        self._state = {
            name: {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for name, parameter in self._named.items()
        }

    @torch.no_grad()
    def update(self, learning_rate: float, divisor: Tensor | None, skip: Tensor) -> None:
        for group in self._groups:
            given = {name: p for name, p in group.parameters.items() if p.grad is not None}
            state = [self._state[f"{group.name}.{name}"] for name in given]
            adam(
                list(given.values()),
                [p.grad for p in given.values() if p.grad is not None],
                [each["exp_avg"] for each in state],
                [each["exp_avg_sq"] for each in state],
                [],
                [each["step"] for each in state],
                fused=True,
                # The hooks for loss scaling: the update divides by the one, and rests where the other is 1.
                grad_scale=divisor,
                found_inf=skip.float(),
                decoupled_weight_decay=True,
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=learning_rate * group.lr_scale,
                weight_decay=group.weight_decay,
                eps=self._eps,
                maximize=False,
            )

    def state_tensors(self) -> dict[str, Tensor]:
        """`<group>.<parameter>.<step | exp_avg | exp_avg_sq>` -> the live tensor (not a copy)."""
        return {f"{name}.{key}": tensor for name, state in self._state.items() for key, tensor in state.items()}
