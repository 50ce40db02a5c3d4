"""Gated (Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders", arXiv 2404.16014)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plmsae_cli.sae.dense import Dense
from plmsae_cli.sae.interface import Losses, Reduce, one_process


class Gated(Dense):
    """Which latents are active, and how strongly, from one encoder with two scales and biases.

    pi = W_enc (x - b_dec) + b_gate;  z = H(pi) ReLU(exp(r) W_enc (x - b_dec) + b_mag). `b_enc_N` is b_gate.
    """

    def __init__(
        self, d: int, num_latents: int, sparsity_coefficient: float = 5.0, sparsity_warmup: float = 0.05
    ) -> None:
        """`sparsity_coefficient`: lambda, for inputs with E||x||^2 = d."""
        super().__init__(d, num_latents, sparsity_coefficient, sparsity_warmup)
        self.r_mag_N = nn.Parameter(torch.zeros(num_latents))
        self.b_mag_N = nn.Parameter(torch.zeros(num_latents))

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""
        return {
            "d": self.d,
            "num_latents": self.num_latents,
            "sparsity_coefficient": self.sparsity_coefficient,
            "sparsity_warmup": self.sparsity_warmup,
        }

    def step_bytes(self, rows: int) -> int:
        """Gates and magnitudes are held for all latents."""
        return 7 * rows * self.num_latents * 4

    def flops_per_token(self) -> float:
        """As dense, and of the frozen decoder the product and the gradient of what it decodes."""
        return 14.0 * self.num_latents * self.d

    def encode_dense(self, x_BD: Tensor) -> Tensor:
        """H(pi) ReLU(exp(r) W_enc (x - b_dec) + b_mag): [B, N]."""
        return self._gate_and_latents(x_BD)[1]

    def loss(self, x_BD: Tensor, dead_N: Tensor, global_rows: int, reduce: Reduce = one_process) -> Losses:
        """(sum ||x - xhat||^2 + lambda sum ReLU(pi) + sum ||x - xhat_frozen(ReLU(pi))||^2) / (B_global d).

        xhat_frozen decodes with W_dec and b_dec as constants: the gate alone learns from it. `aux` is the L1 of
        ReLU(pi) a token.
        """
        gate_BN, z_BN = self._gate_and_latents(x_BD)
        open_BN = gate_BN.relu()
        xhat_BD = self._decode(z_BN)
        frozen_BD = open_BN @ self.w_dec_ND.detach() + self.b_dec_D.detach()
        error, frozen = ((xhat - x_BD).square().sum() for xhat in (xhat_BD, frozen_BD))
        return self._losses(error, open_BN.sum(), global_rows, z_BN, xhat_BD, more=frozen)

    @torch.no_grad()
    def scale_latents_(self, factors_N: Tensor) -> None:
        """Multiply each latent's activations by its factor and divide its decoder row by it, in place."""
        super().scale_latents_(factors_N)
        self.b_mag_N.mul_(factors_N)

    @torch.no_grad()
    def fold_(self, mean_D: Tensor, scale: float) -> None:
        """From the input (x - mean) * scale to raw activations x, in place."""
        super().fold_(mean_D, scale)
        self.b_mag_N.div_(scale)

    def _gate_and_latents(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        projected_BN = self._project(x_BD)
        gate_BN = projected_BN + self.b_enc_N
        magnitude_BN = (projected_BN * self.r_mag_N.exp() + self.b_mag_N).relu()
        return gate_BN, torch.where(gate_BN > 0, magnitude_BN, 0.0)
