"""Adam with moments in bfloat16, stochastically rounded: half the state, and no moment freezes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plmsae_cli.training.optimizers.base import Group, Optimizer, safe_gradient
from plmsae_cli.training.rounding import stochastic_bfloat16

_TILE = 2**22  # elements whose float32 temporaries exist at once


class RoundedAdam(Optimizer):
    """Adam (Kingma & Ba 2015), AdamW where a group has `weight_decay`, in float32 arithmetic.

    Each step's moments are used as computed and then stored in bfloat16 by `rounding.stochastic_bfloat16`, with
    the number of updates as its step, and 2 p and 2 p + 1 as the salts of exp_avg and exp_avg_sq of parameter p
    (counted through the groups).
    """

    def __init__(self, groups: Sequence[Group], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups)
        self._betas, self._eps = betas, eps
        self._salts = {name: 2 * place for place, name in enumerate(self._named)}
        self._state = {
            name: {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p, dtype=torch.bfloat16),
                "exp_avg_sq": torch.zeros_like(p, dtype=torch.bfloat16),
            }
            for name, p in self._named.items()
        }

    def state_tensors(self) -> dict[str, Tensor]:
        """`<group>.<parameter>.<step | exp_avg | exp_avg_sq>` -> the live tensor (not a copy)."""
        return {f"{name}.{key}": tensor for name, state in self._state.items() for key, tensor in state.items()}

    def update(self, learning_rate: float, divisor: Tensor | None, skip: Tensor) -> None:
        beta1, beta2 = self._betas
        for group, name, parameter, gradient in self._trained():
            rate = learning_rate * group.lr_scale
            state = self._state[name]
            step = state["step"]
            step.add_(~skip)
            # float64, since 1 - .999 ** step cancels in float32.
            correction1 = (1 - beta1 ** step.double()).float()
            correction2 = (1 - beta2 ** step.double()).float()
            size = torch.where(skip, 0.0, rate / correction1)
            shrink = torch.where(skip, 1.0, 1.0 - rate * group.weight_decay)
            flat = (parameter.view(-1), gradient.reshape(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1))
            short = name.removeprefix(f"{group.name}.")
            start = group.first_rows.get(short, 0) * parameter[0].numel()
            for w, g, first, second in zip(*(torch.split(tensor, _TILE) for tensor in flat), strict=True):
                index = _indices(start, w)
                start += w.numel()
                g = safe_gradient(g, divisor, skip, torch.zeros_like(g))
                m = first.float().lerp_(g, 1 - beta1)
                v = second.float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
                for kept, new, salt in ((first, m, 0), (second, v, 1)):
                    rounded = stochastic_bfloat16(new, index, step.int(), self._salts[name] + salt)
                    kept.copy_(torch.where(skip, kept, rounded))
                w.mul_(shrink).sub_(size * m / (v.div_(correction2).sqrt_().add_(self._eps)))


def _indices(start: int, like: Tensor) -> Tensor:
    """start, start + 1, ... modulo 2^32, as int32."""
    first = (start + 2**31) % 2**32 - 2**31
    return torch.arange(like.numel(), dtype=torch.int32, device=like.device) + first
