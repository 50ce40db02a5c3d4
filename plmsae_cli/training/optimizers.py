"""Adam with named state, clipping inside the update, and no wait for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class Group:
    """Parameters that share their options."""

    name: str
    parameters: Mapping[str, Parameter]
    weight_decay: float = 0.0
    """Decoupled (AdamW, Loshchilov & Hutter 2019): each step first shrinks weights by rate * weight_decay."""
    lr_scale: float = 1.0
    """This group's rate is the step's rate times this."""


class Adam:
    """Adam (Kingma & Ba 2015) over named groups; AdamW where a group has `weight_decay`.

    Uses torch's fused update, which on CPU and CUDA alike reads and writes each tensor once.
    """

    def __init__(self, groups: Sequence[Group], betas: tuple[float, float], eps: float) -> None:
        self._named = {f"{group.name}.{name}": p for group in groups for name, p in group.parameters.items()}
        self._scales = [group.lr_scale for group in groups]
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

    @torch.no_grad()
    def step(self, learning_rate: float, max_norm: float | None = None) -> Tensor:
        """Update all parameters by their gradients, whose global norm is first scaled down to `max_norm`.

        Returns the norm before scaling, on the device: nothing waits for it. Where it is not finite, nothing
        is changed (on any rank, as all hold the same gradients). Gradients may be scaled in place.
        """
        gradients = [p.grad for p in self._named.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # The hooks for loss scaling: the fused update divides by the one, and rests where the other is 1.
        self._adam.grad_scale = None if max_norm is None else (norm / max_norm).clamp(min=1.0).float()
        self._adam.found_inf = (~norm.isfinite()).float()
        for options, scale in zip(self._adam.param_groups, self._scales, strict=True):
            options["lr"] = learning_rate * scale
        self._adam.step()
        return norm

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self._adam.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """`<group>.<parameter>.<step | exp_avg | exp_avg_sq>` -> the live tensor (not a copy)."""
        return {
            f"{name}.{key}": tensor
            for name, parameter in self._named.items()
            for key, tensor in self._adam.state[parameter].items()
        }

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state_tensors` gave. Raises ValueError where names or shapes differ."""
        own = self.state_tensors()
        differing = sorted(
            name
            for name in own.keys() | tensors.keys()
            if name not in own or name not in tensors or own[name].shape != tensors[name].shape
        )
        if differing:
            raise ValueError(f"the saved optimiser state does not fit these parameters: {', '.join(differing)}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
