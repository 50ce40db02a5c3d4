"""MultiTopK: a TopK dictionary that stays good when more latents are kept (Gao et al. 2024, arXiv 2406.04093, A.7)."""

from __future__ import annotations

from torch import Tensor

from plmsae_cli.sae.interface import Losses, Reduce, one_process
from plmsae_cli.sae.sparse import Pairs, sparse_decode
from plmsae_cli.sae.topk import TopK

WIDER = 4
WIDER_WEIGHT = 1 / 8


class MultiTopK(TopK):
    """TopK trained on L(k) + L(4 k) / 8."""

    def flops_per_token(self) -> float:
        """As TopK, with the encoder's gradient at the wider choice alone; and decoding that, with two gradients."""
        wide = min(WIDER * self.k, self.num_latents)
        return float(2 * self.num_latents * self.d + 6 * self.k * self.d + 8 * wide * self.d)

    def loss(self, x_BD: Tensor, dead_N: Tensor, global_rows: int, reduce: Reduce = one_process) -> Losses:
        """TopK's loss with a second reconstruction from 4 k latents (all, if fewer); `reconstruction` is L(k)."""
        k = self.training_k
        wide = self._select(x_BD, min(WIDER * k, self.num_latents))
        wide_pairs = Pairs.of_rows(wide.indices_BK, self.num_latents)
        pairs = Pairs.of_rows(wide.indices_BK[:, :k].contiguous(), self.num_latents)

        acts_BK = self._attach(wide.acts_BK.flatten(), x_BD, wide_pairs).view_as(wide.acts_BK)
        acts_P = acts_BK[:, :k].flatten()
        error, xhat_BD = self._error(acts_P, x_BD, pairs)
        wide_BD = sparse_decode(acts_BK.flatten(), self.w_dec_ND, wide_pairs) + self.b_dec_D
        scale = 1 / (global_rows * self.d)
        losses = self._losses(error * scale, x_BD, xhat_BD, acts_P.detach(), pairs, dead_N, reduce)
        return losses._replace(total=losses.total + WIDER_WEIGHT * scale * (wide_BD - x_BD).square().sum())
