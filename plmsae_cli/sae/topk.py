"""TopK with AuxK (Gao et al. 2024, "Scaling and evaluating sparse autoencoders", arXiv 2406.04093)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from plmsae_cli.sae.auxk import auxk_loss
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.interface import Latents, Losses, Reduce, one_process, ramp
from plmsae_cli.sae.selection import encode_top_k
from plmsae_cli.sae.sparse import Pairs, attach_encoder, sparse_decode


class TopK(Dictionary):
    """a = W_enc (x - b_dec) + b_enc;  z = ReLU(TopK_k(a));  xhat = z W_dec + b_dec.

    Active latents come in decreasing order of activation; equal ones in increasing order of index.
    """

    aux_fitted: bool = True
    """Whether AuxK fits the length of its reconstruction (see `auxk_loss`); False is Gao et al.'s."""

    def __init__(
        self,
        d: int,
        num_latents: int,
        k: int,
        k_aux: int | None = None,
        aux_coefficient: float = 1 / 32,
        k_start: int | None = None,
        k_anneal: float = 0.1,
    ) -> None:
        """`k_aux`: dead latents that AuxK revives at once, by default d // 2; `aux_coefficient` 0: no AuxK.

        With `k_start`, training goes from so many active latents linearly to k over the first `k_anneal` of the run.

        Raises ValueError where k or k_start is not in 1..num_latents or k_aux is below 1.
        """
        super().__init__(d, num_latents)
        self.k = k
        self.k_aux = max(1, d // 2) if k_aux is None else k_aux
        self.aux_coefficient = aux_coefficient
        self.k_start = k_start
        self.k_anneal = k_anneal
        self.training_k = k
        self.prefixes: tuple[int, ...] = (num_latents,)
        """Latents of each nested reconstruction: here the whole dictionary is the only one."""
        for name, value in (("k", k), ("k_start", k_start)):
            if value is not None and not 1 <= value <= num_latents:
                raise ValueError(
                    f"{name} = {value} active of {num_latents} latents: choose {name} from 1 to {num_latents}"
                )
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
            "k_start": self.k_start,
            "k_anneal": self.k_anneal,
        }

    def start_latents(self, x_BD: Tensor) -> Latents | None:
        """The k largest latents of each token."""
        return self._select(x_BD, self.k)

    def schedule(self, step: int, total_steps: int) -> None:
        """Anneal k."""
        if self.k_start is not None:
            done = ramp(step - 1, total_steps, self.k_anneal)  # none at the first step
            self.training_k = round(self.k_start + (self.k - self.k_start) * done)

    def flops_per_token(self) -> float:
        """The encoder's product; at k latents decoding and three gradients. Without AuxK."""
        return float(2 * self.num_latents * self.d + 8 * self.k * self.d)

    def encode(self, x_BD: Tensor) -> Latents:
        """The k largest latents of `x_BD`, ReLU applied."""
        selected = self._select(x_BD, self.k)
        pairs = Pairs.of_rows(selected.indices_BK, self.num_latents)
        acts_P = self._attach(selected.acts_BK.flatten(), x_BD, pairs)
        return Latents(acts_P.view_as(selected.acts_BK), selected.indices_BK)

    def loss(self, x_BD: Tensor, dead_N: Tensor, global_rows: int, reduce: Reduce = one_process) -> Losses:
        """sum ||x - xhat||^2 / (B_global d) + aux_coefficient * AuxK over the latents in `dead_N`."""
        acts_P, pairs = self._choose(x_BD, global_rows, reduce)
        error, xhat_BD = self._error(self._attach(acts_P, x_BD, pairs), x_BD, pairs)
        return self._losses(error / (global_rows * self.d), x_BD, xhat_BD, acts_P, pairs, dead_N, reduce)

    def _select(self, x_BD: Tensor, k: int) -> Latents:
        return encode_top_k(x_BD - self.b_dec_D, self.w_enc_ND, self.b_enc_N, k)

    def _choose(self, x_BD: Tensor, global_rows: int, reduce: Reduce) -> tuple[Tensor, Pairs]:
        """Activations [P] of the pairs that a training step keeps, without their gradient."""
        selected = self._select(x_BD, self.training_k)
        return selected.acts_BK.flatten(), Pairs.of_rows(selected.indices_BK, self.num_latents)

    def _attach(self, acts_P: Tensor, x_BD: Tensor, pairs: Pairs) -> Tensor:
        return attach_encoder(acts_P, x_BD, self.w_enc_ND, self.b_enc_N, self.b_dec_D, pairs)

    def _error(self, acts_P: Tensor, x_BD: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Summed squared error, and the reconstruction without a gradient."""
        xhat_BD = sparse_decode(acts_P, self.w_dec_ND, pairs) + self.b_dec_D
        return (xhat_BD - x_BD).square().sum(), xhat_BD.detach()

    def _losses(
        self,
        reconstruction: Tensor,
        x_BD: Tensor,
        xhat_BD: Tensor,
        acts_P: Tensor,
        pairs: Pairs,
        dead_N: Tensor,
        reduce: Reduce,
    ) -> Losses:
        fired_N, active_B = pairs.fired(acts_P), pairs.active(acts_P)
        if self.aux_coefficient == 0:
            return Losses(reconstruction, reconstruction, x_BD.new_zeros(()), fired_N, active_B, xhat_BD)
        aux = auxk_loss(self, x_BD, x_BD - xhat_BD, dead_N, self.k_aux, reduce, self.aux_fitted)
        total = reconstruction + self.aux_coefficient * aux
        return Losses(total, reconstruction, aux, fired_N, active_B, xhat_BD)
