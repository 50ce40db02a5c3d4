"""TopK with AuxK (Gao et al. 2024, "Scaling and evaluating sparse autoencoders", arXiv 2406.04093)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from plmsae_cli.sae.auxk import auxk_loss
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.interface import Latents, Losses, Reduce, one_process
from plmsae_cli.sae.selection import encode_top_k
from plmsae_cli.sae.sparse import Pairs, attach_encoder, sparse_decode


class TopK(Dictionary):
    """a = W_enc (x - b_dec) + b_enc;  z = ReLU(TopK_k(a));  xhat = z W_dec + b_dec.

    Active latents come in decreasing order of activation; equal ones in increasing order of index.
    """

    def __init__(
        self, d: int, num_latents: int, k: int, k_aux: int | None = None, aux_coefficient: float = 1 / 32
    ) -> None:
        """`k_aux`: dead latents that AuxK revives at once, by default d // 2; `aux_coefficient` 0: no AuxK.

        Raises ValueError where k is not in 1..num_latents or k_aux is below 1.
        """
        super().__init__(d, num_latents)
        self.k = k
        self.k_aux = max(1, d // 2) if k_aux is None else k_aux
        self.aux_coefficient = aux_coefficient
        if not 1 <= k <= num_latents:
            raise ValueError(f"k = {k} active of {num_latents} latents: choose k from 1 to {num_latents}")
        if self.k_aux < 1:
            raise ValueError(f"k_aux = {k_aux} revives no latent: choose 1 or more, or aux_coefficient = 0")

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""
        return {
            "d": self.d,
            "num_latents": self.num_latents,
            "k": self.k,
            "k_aux": self.k_aux,
            "aux_coefficient": self.aux_coefficient,
        }

    def encode(self, x_BD: Tensor) -> Latents:
        """The k largest latents of `x_BD`, ReLU applied."""
        selected = self._select(x_BD)
        pairs = Pairs.of_rows(selected.indices_BK, self.num_latents)
        return Latents(self._attach(selected, x_BD, pairs).view_as(selected.acts_BK), selected.indices_BK)

    def decode(self, latents: Latents) -> Tensor:
        """z W_dec + b_dec: [B, D]."""
        pairs = Pairs.of_rows(latents.indices_BK, self.num_latents)
        return sparse_decode(latents.acts_BK.flatten(), self.w_dec_ND, pairs) + self.b_dec_D

    def loss(self, x_BD: Tensor, dead_N: Tensor, global_rows: int, reduce: Reduce = one_process) -> Losses:
        """sum ||x - xhat||^2 / (B_global d) + aux_coefficient * AuxK over the latents in `dead_N`."""
        selected = self._select(x_BD)
        pairs = Pairs.of_rows(selected.indices_BK, self.num_latents)
        xhat_BD = sparse_decode(self._attach(selected, x_BD, pairs), self.w_dec_ND, pairs) + self.b_dec_D
        reconstruction = (xhat_BD - x_BD).square().sum() / (global_rows * self.d)
        return self._with_aux(reconstruction, x_BD, selected, xhat_BD.detach(), dead_N, reduce)

    def _select(self, x_BD: Tensor) -> Latents:
        return encode_top_k(x_BD - self.b_dec_D, self.w_enc_ND, self.b_enc_N, self.k)

    def _attach(self, selected: Latents, x_BD: Tensor, pairs: Pairs) -> Tensor:
        acts_P = selected.acts_BK.flatten()
        return attach_encoder(acts_P, x_BD, self.w_enc_ND, self.b_enc_N, self.b_dec_D, pairs)

    def _with_aux(
        self,
        reconstruction: Tensor,
        x_BD: Tensor,
        latents: Latents,
        xhat_BD: Tensor,
        dead_N: Tensor,
        reduce: Reduce,
    ) -> Losses:
        if self.aux_coefficient == 0:
            return Losses(reconstruction, reconstruction, x_BD.new_zeros(()), latents, xhat_BD)
        aux = auxk_loss(self, x_BD, x_BD - xhat_BD, dead_N, self.k_aux, reduce)
        total = reconstruction + self.aux_coefficient * aux
        return Losses(total, reconstruction, aux, latents, xhat_BD)
