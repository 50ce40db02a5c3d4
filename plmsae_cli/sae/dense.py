"""What the architectures share whose sparsity is learned: any number of a token's latents may be active.

Their maths is dense: gradients reach thresholds and gates of latents that are not active.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.interface import Latents, Losses, ramp
from plmsae_cli.sae.selection import active_latents


class Dense(Dictionary):
    """A dictionary with a sparsity penalty, whose weight rises linearly over the first share of a run.

    Losses are those of the papers divided by d, the unit of TopK's: weights keep the papers' meaning.
    """

    compiles = True
    sparsity: Tensor
    """The weight at this step; a tensor, since a number would be compiled in."""

    def __init__(self, d: int, num_latents: int, sparsity_coefficient: float, sparsity_warmup: float) -> None:
        super().__init__(d, num_latents)
        self.sparsity_coefficient = sparsity_coefficient
        self.sparsity_warmup = sparsity_warmup
        self.register_buffer("sparsity", torch.tensor(float(sparsity_coefficient)), persistent=False)

    def schedule(self, step: int, total_steps: int) -> None:
        """Warm the weight of the penalty up."""
        self.sparsity.fill_(self.sparsity_coefficient * ramp(step, total_steps, self.sparsity_warmup))

    def step_bytes(self, rows: int) -> int:
        """Pre-activations, activations and the gradients of both are held for all latents."""
        return 4 * rows * self.num_latents * 4

    @abstractmethod
    def encode_dense(self, x_BD: Tensor) -> Tensor:
        """All N latents of `x_BD`, mostly zeros: [B, N]."""

    def encode(self, x_BD: Tensor) -> Latents:
        """The active latents; K is the largest number of them in a token of this batch."""
        return active_latents(self.encode_dense(x_BD))

    def largest(self, x_BD: Tensor) -> Tensor:
        """The largest activation of each latent among these tokens: [N]; none is sorted for it."""
        return self.encode_dense(x_BD).amax(0)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Reconstruction of `x_BD`."""
        return self._decode(self.encode_dense(x_BD))

    def _project(self, x_BD: Tensor) -> Tensor:
        """W_enc (x - b_dec)."""
        # The second term is 0: it carries b_dec's gradient in a matrix-vector product, not one with all tokens.
        centre_D = self.b_dec_D.detach()
        return F.linear(x_BD - centre_D, self.w_enc_ND, self.w_enc_ND @ (centre_D - self.b_dec_D)).to(x_BD.dtype)

    def _decode(self, z_BN: Tensor) -> Tensor:
        return z_BN @ self.w_dec_ND + self.b_dec_D

    def _row_norms(self) -> Tensor:
        norms_N: Tensor = torch.linalg.vector_norm(self.w_dec_ND, dim=1)
        return norms_N

    def _losses(
        self,
        error: Tensor,
        penalty: Tensor,
        global_rows: int,
        z_BN: Tensor,
        xhat_BD: Tensor,
        more: Tensor | None = None,
        unit: float = 1.0,
    ) -> Losses:
        """From sums over this rank's tokens: ||x - xhat||^2, the penalty in `unit`s, a further term that has no weight."""
        scale = 1 / (global_rows * self.d)
        summed = error + self.sparsity * unit * penalty
        active_BN = z_BN > 0
        return Losses(
            (summed if more is None else summed + more) * scale,
            error * scale,
            penalty / global_rows,
            active_BN.any(0),
            active_BN.sum(1),
            xhat_BD.detach(),
        )
