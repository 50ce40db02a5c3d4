"""Muon: the momentum of a matrix, made nearly orthogonal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from plmsae_cli.training.optimizers.adam import Adam
from plmsae_cli.training.optimizers.base import Group, Optimizer, safe_gradient

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MATCHING_RMS = 0.2


class Muon(Optimizer):
    """m <- momentum m + (1 - momentum) g;  u = NS((1 - momentum) g + momentum m);
    W <- (1 - rate weight_decay) W - rate .2 sqrt(max(rows, columns)) u.

    Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with Nesterov's momentum, for the 2-D parameters of groups
    with `linear_maps`; all others by `Adam` at the same rate. The factor is that of Moonlight (Liu et al. 2025,
    arXiv 2502.16982, section 2.2): it gives the update of a matrix of any shape the root mean square of a typical Adam
    update, .2, so that one rate, and Adam's, serves matrices and vectors alike.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        arithmetic: torch.dtype | None = None,
    ) -> None:
        """`betas`, `eps`: Adam's; `arithmetic`: of Newton-Schulz, by default bfloat16 on CUDA and float32 on a CPU."""
        super().__init__(groups)
        self._adam = Adam([_part(group, orthogonal=False) for group in groups], betas, eps)
        self._groups = tuple(_part(group, orthogonal=True) for group in groups)
        self._beta, self._arithmetic = momentum, arithmetic
        self._momentum = {
            f"{group.name}.{name}": torch.zeros_like(p)
            for group in self._groups
            for name, p in group.parameters.items()
        }

    def state_tensors(self) -> dict[str, Tensor]:
        """`<group>.<parameter>.momentum` of matrices, and Adam's of all others -> the live tensor (not a copy)."""
        return {f"{name}.momentum": t for name, t in self._momentum.items()} | self._adam.state_tensors()

    def update(self, learning_rate: float, divisor: Tensor | None, skip: Tensor) -> None:
        self._adam.update(learning_rate, divisor, skip)
        for group, name, parameter, gradient in self._trained():
            rate = torch.where(skip, 0.0, learning_rate * group.lr_scale)
            m = self._momentum[name]
            gradient = safe_gradient(gradient, divisor, skip, m)
            m.lerp_(gradient, 1 - self._beta)
            dtype = self._arithmetic or (torch.bfloat16 if m.is_cuda else torch.float32)
            u = orthogonalise(gradient.lerp(m, self._beta).to(dtype)).float()
            size = rate * (MATCHING_RMS * math.sqrt(max(u.shape)))
            parameter.mul_(1 - rate * group.weight_decay).sub_(size * u)


def orthogonalise(m: Tensor) -> Tensor:
    """Newton-Schulz: m = U S V^T to about U V^T, in the dtype of `m`; singular values end between .7 and 1.2.

    Five times X <- a X + (b A + c A^2) X with A = X X^T, from X = m / ||m||_F, with the quintic that rises most steeply at 0
    (Jordan et al. 2024).
    """
    a, b, c = COEFFICIENTS
    tall = m.shape[0] > m.shape[1]
    x = m.mT if tall else m
    x = x / torch.linalg.vector_norm(x).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _part(group: Group, orthogonal: bool) -> Group:
    """The group's matrices, or all that is not a matrix."""
    chosen = {n: p for n, p in group.parameters.items() if (group.linear_maps and p.ndim == 2) == orthogonal}
    return replace(group, parameters=chosen)
