"""JumpReLU, a ReLU with a learned threshold a latent.

Two penalties: L0 (Rajamanoharan et al. 2024, "Jumping ahead", arXiv 2407.14435), and tanh with a pre-activation term
(Anthropic, "Circuits updates: January 2025", dictionary learning optimization techniques).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from plmsae_cli.sae.dense import Dense
from plmsae_cli.sae.interface import Losses, Reduce, one_process

Penalty = Literal["l0", "tanh"]


class JumpReLU(Dense):
    """a = W_enc (x - b_dec) + b_enc;  z = a H(a - theta);  theta = exp(log_theta), one a latent.

    With `penalty` l0, decoder rows have norm 1 and L = ||x - xhat||^2 + lambda d sum_i H(a_i - theta_i), or
    lambda d (L0 / target_l0 - 1)^2 with L0 the mean over the global batch; the factor d carries the paper's
    lambda, for E||x||^2 = 1, to inputs with E||x||^2 = d. With tanh, rows are free and
    L = ||x - xhat||^2 + lambda sum_i tanh(c z_i ||W_dec,i||) + lambda_P sum_i ReLU(theta_i - a_i) ||W_dec,i||.
    """

    def __init__(
        self,
        d: int,
        num_latents: int,
        sparsity_coefficient: float | None = None,
        sparsity_warmup: float | None = None,
        penalty: Penalty = "l0",
        target_l0: float | None = None,
        bandwidth: float | None = None,
        theta_start: float | None = None,
        tanh_scale: float = 4.0,
        pre_act_coefficient: float = 3e-6,
    ) -> None:
        """Defaults by penalty: lambda 6e-4 (1 with a target) and 5; its warm-up .05 and 1 of the run; the width of
        the estimated gradient 1e-3 sqrt(d) and 2; theta at the start 1e-3 sqrt(d) and .1.

        Raises ValueError where there are fewer latents than `target_l0`.
        """
        if target_l0 is not None and target_l0 > num_latents:
            raise ValueError(
                f"target_l0 = {target_l0:g} active of {num_latents} latents: choose one up to {num_latents}"
            )
        l0 = penalty == "l0"
        weight = (6e-4 if target_l0 is None else 1.0) if l0 else 5.0
        super().__init__(
            d,
            num_latents,
            weight if sparsity_coefficient is None else sparsity_coefficient,
            (0.05 if l0 else 1.0) if sparsity_warmup is None else sparsity_warmup,
        )
        self.unit_rows = l0
        self.penalty = penalty
        self.target_l0 = target_l0
        narrow = 1e-3 * math.sqrt(d)
        self.bandwidth = (narrow if l0 else 2.0) if bandwidth is None else bandwidth
        self.theta_start = (narrow if l0 else 0.1) if theta_start is None else theta_start
        self.tanh_scale = tanh_scale
        self.pre_act_coefficient = pre_act_coefficient
        self.log_theta_N = nn.Parameter(torch.full((num_latents,), math.log(self.theta_start)))

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""
        return {
            "d": self.d,
            "num_latents": self.num_latents,
            "sparsity_coefficient": self.sparsity_coefficient,
            "sparsity_warmup": self.sparsity_warmup,
            "penalty": self.penalty,
            "target_l0": self.target_l0,
            "bandwidth": self.bandwidth,
            "theta_start": self.theta_start,
            "tanh_scale": self.tanh_scale,
            "pre_act_coefficient": self.pre_act_coefficient,
        }

    def step_bytes(self, rows: int) -> int:
        """As dense, and what the penalty is computed from."""
        return (5 if self.penalty == "l0" else 7) * rows * self.num_latents * 4

    def encode_dense(self, x_BD: Tensor) -> Tensor:
        """a H(a - theta): [B, N]."""
        return jump_relu(self._project(x_BD) + self.b_enc_N, self.log_theta_N.exp(), self.bandwidth)

    def loss(self, x_BD: Tensor, dead_N: Tensor, global_rows: int, reduce: Reduce = one_process) -> Losses:
        """The loss of `penalty` over B_global d; `aux` is L0, the squared miss of its target, or the tanh, a token."""
        pre_BN = self._project(x_BD) + self.b_enc_N
        theta_N = self.log_theta_N.exp()
        z_BN = jump_relu(pre_BN, theta_N, self.bandwidth)
        xhat_BD = self._decode(z_BN)
        error = (xhat_BD - x_BD).square().sum()
        if self.penalty == "tanh":
            norms_N = self._row_norms()
            penalty = torch.tanh(self.tanh_scale * norms_N * z_BN).sum()
            silent = ((theta_N - pre_BN).relu().sum(0) * norms_N).sum()
            return self._losses(error, penalty, global_rows, z_BN, xhat_BD, more=self.pre_act_coefficient * silent)
        active = step(pre_BN, theta_N, self.bandwidth).sum()
        if self.target_l0 is not None:
            active = self._miss(active, len(x_BD), global_rows, reduce)
        return self._losses(error, active, global_rows, z_BN, xhat_BD, unit=self.d)

    def _miss(self, active: Tensor, rows: int, global_rows: int, reduce: Reduce) -> Tensor:
        """This rank's share of B_global (L0 / target_l0 - 1)^2, with its gradient through this rank's tokens."""
        assert self.target_l0 is not None
        miss = reduce(active.detach().clone()) / (global_rows * self.target_l0) - 1
        slope = 2 * miss / self.target_l0
        return rows * miss.square() + slope * (active - active.detach())

    @torch.no_grad()
    def scale_latents_(self, factors_N: Tensor) -> None:
        """Multiply each latent's activations, and its threshold, by its factor, in place."""
        super().scale_latents_(factors_N)
        self.log_theta_N.add_(factors_N.log())

    @torch.no_grad()
    def fold_(self, mean_D: Tensor, scale: float) -> None:
        """From the input (x - mean) * scale to raw activations x, in place; theta is in raw units too."""
        super().fold_(mean_D, scale)
        self.log_theta_N.sub_(math.log(scale))


def jump_relu(pre_BN: Tensor, theta_N: Tensor, bandwidth: float) -> Tensor:
    """a H(a - theta). With K(u) = 1 for |u| < 1/2: d/da = H, d/dtheta = -(theta / eps) K((a - theta) / eps)."""
    out: Tensor = _JumpReLU.apply(pre_BN, theta_N, bandwidth)  # type: ignore[no-untyped-call]
    return out


def step(pre_BN: Tensor, theta_N: Tensor, bandwidth: float) -> Tensor:
    """H(a - theta): d/da = 0, d/dtheta = -(1 / eps) K((a - theta) / eps)."""
    out: Tensor = _Step.apply(pre_BN, theta_N, bandwidth)  # type: ignore[no-untyped-call]
    return out


def _near(pre_BN: Tensor, theta_N: Tensor, bandwidth: float) -> Tensor:
    return (pre_BN - theta_N).abs() < bandwidth / 2


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_BN: Tensor, theta_N: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_BN, theta_N)
        ctx.bandwidth = bandwidth
        return torch.where(pre_BN > theta_N, pre_BN, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BN: Tensor) -> tuple[Tensor | None, ...]:
        pre_BN, theta_N = ctx.saved_tensors
        near_N = torch.where(_near(pre_BN, theta_N, ctx.bandwidth), grad_BN, 0.0).sum(0)
        return torch.where(pre_BN > theta_N, grad_BN, 0.0), near_N * theta_N / -ctx.bandwidth, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_BN: Tensor, theta_N: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_BN, theta_N)
        ctx.bandwidth = bandwidth
        return (pre_BN > theta_N).to(pre_BN.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BN: Tensor) -> tuple[Tensor | None, ...]:
        pre_BN, theta_N = ctx.saved_tensors
        near_N = torch.where(_near(pre_BN, theta_N, ctx.bandwidth), grad_BN, 0.0).sum(0)
        return None, near_N / -ctx.bandwidth, None
