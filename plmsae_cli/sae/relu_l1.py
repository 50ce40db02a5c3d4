"""ReLU with an L1 penalty weighted by decoder norms (Anthropic, "Circuits updates: April 2024").

InterPLM (Simon and Zou 2024) minimises the length of the error, not its square: both terms then grow alike with the
input, so that its lambda holds at any scale.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from plmsae_cli.sae.dense import Dense
from plmsae_cli.sae.interface import Losses, Reduce, one_process

START_NORM = 0.1
Error = Literal["squared", "norm"]


class ReLUL1(Dense):
    """z = ReLU(W_enc (x - b_dec) + b_enc);  L = ||x - xhat||^2 + lambda sum_i z_i ||W_dec,i||.

    With `error` norm, ||x - xhat|| stands for its square. Decoder rows may have any norm, unless `unit_rows`: then the
    penalty is the plain L1 (Bricken et al. 2023).
    """

    def __init__(
        self,
        d: int,
        num_latents: int,
        sparsity_coefficient: float | None = None,
        sparsity_warmup: float = 0.05,
        unit_rows: bool = False,
        error: Error = "squared",
    ) -> None:
        """`sparsity_coefficient`: lambda, by default 5, for inputs with E||x||^2 = d; with `error` norm .08."""
        weight = 5.0 if error == "squared" else 0.08
        super().__init__(
            d, num_latents, weight if sparsity_coefficient is None else sparsity_coefficient, sparsity_warmup
        )
        self.unit_rows = unit_rows
        self.error = error

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""
        return {
            "d": self.d,
            "num_latents": self.num_latents,
            "sparsity_coefficient": self.sparsity_coefficient,
            "sparsity_warmup": self.sparsity_warmup,
            "unit_rows": self.unit_rows,
            "error": self.error,
        }

    @torch.no_grad()
    def start_(self, generator: torch.Generator) -> None:
        """Free rows start at norm 0.1, in encoder and decoder."""
        if not self.unit_rows:
            self.w_enc_ND.mul_(START_NORM)
            self.w_dec_ND.mul_(START_NORM)

    def encode_dense(self, x_BD: Tensor) -> Tensor:
        """ReLU(W_enc (x - b_dec) + b_enc): [B, N]."""
        return (self._project(x_BD) + self.b_enc_N).relu()

    def loss(self, x_BD: Tensor, dead_N: Tensor, global_rows: int, reduce: Reduce = one_process) -> Losses:
        """(sum of errors + lambda sum z_i ||W_dec,i||) / (B_global d); `aux` is the L1 a token."""
        z_BN = self.encode_dense(x_BD)
        xhat_BD = self._decode(z_BN)
        penalty = (z_BN.sum(0) * self._row_norms()).sum()
        residual_BD = xhat_BD - x_BD
        error = residual_BD.square() if self.error == "squared" else torch.linalg.vector_norm(residual_BD, dim=1)
        return self._losses(error.sum(), penalty, global_rows, z_BN, xhat_BD)
