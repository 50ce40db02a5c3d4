"""A TopK dictionary, or its Matryoshka, whose latents are spread over ranks: no gradient ever travels.

Every rank sees all tokens of the batch and scores its own latents. The k best of each rank are candidates; among them
every rank finds the k best of all, equal ones by the lowest latent, and keeps its own. Partial reconstructions are
added up; from the error each rank has the gradients of its latents whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from plmsae_cli.sae.auxk import fitted_length
from plmsae_cli.sae.interface import Losses, Reduce, one_process
from plmsae_cli.sae.matryoshka import NestedError
from plmsae_cli.sae.ranks import Ranks, Rows
from plmsae_cli.sae.selection import encode_top_k, top_k
from plmsae_cli.sae.sparse import Pairs, sparse_decode
from plmsae_cli.sae.topk import TopK


class LatentShard(TopK):
    """The latents `rows` of `whole`, with `parameters` of their own; all ranks have as many."""

    def __init__(self, whole: TopK, rows: Rows, parameters: Mapping[str, Parameter], ranks: Ranks) -> None:
        super().__init__(whole.d, rows.num, 1)
        for name in ("k", "k_aux", "aux_coefficient", "aux_fitted", "k_start", "k_anneal", "training_k"):
            setattr(self, name, getattr(whole, name))
        for name, parameter in parameters.items():
            setattr(self, name, parameter)
        self._ranks, self._whole_latents = ranks, whole.num_latents
        prefixes_G = torch.tensor(whole.prefixes, device=self.w_enc_ND.device)
        self._prefixes_G = (prefixes_G - rows.first).clamp(0, rows.num)

    def loss(self, x_BD: Tensor, dead_N: Tensor, global_rows: int, reduce: Reduce = one_process) -> Losses:
        """The loss itself, on every rank, from all `global_rows` tokens; `dead_N`, `fired_N`, `active_B`: of these latents.

        Its gradients are those of these latents, and of b_dec a share of a sum over ranks.
        """
        with torch.no_grad():
            found = encode_top_k(
                x_BD - self.b_dec_D, self.w_enc_ND, self.b_enc_N, min(self.training_k, self.num_latents)
            )
            acts_BK = found.acts_BK * self._among_best(found.acts_BK, self.training_k)
            indices_BK, order_BK = found.indices_BK.sort(dim=1)
            acts_P = acts_BK.gather(1, order_BK).flatten()
        pairs = Pairs.of_rows(indices_BK, self.num_latents)
        attached_P = self._attach(acts_P, x_BD, pairs)
        groups = len(self._prefixes_G)
        group_P = torch.searchsorted(self._prefixes_G, pairs.indices_P, right=True)
        parts_RD = sparse_decode(attached_P, self.w_dec_ND, pairs.split(group_P, groups))
        parts_BGD = self._sum(parts_RD).view(-1, groups, self.d)
        # All ranks have b_dec and the whole error: each answers for its share.
        b_dec_D = self.b_dec_D.detach() + (self.b_dec_D - self.b_dec_D.detach()) / self._ranks.world
        error, xhat_BD = NestedError.apply(parts_BGD, b_dec_D, x_BD)  # type: ignore[no-untyped-call]
        reconstruction = error / (groups * global_rows * self.d)
        aux = x_BD.new_zeros(())
        if self.aux_coefficient:
            aux = self._auxk(x_BD, x_BD - xhat_BD, dead_N)
        total = reconstruction + self.aux_coefficient * aux
        return Losses(total, reconstruction, aux, pairs.fired(acts_P), pairs.active(acts_P), xhat_BD)

    def _auxk(self, x_BD: Tensor, error_BD: Tensor, dead_N: Tensor) -> Tensor:
        """As `auxk_loss`, of the dead of all ranks."""
        dead = self._ranks.sum(dead_N.sum())
        if not dead.is_cuda and not dead:
            return x_BD.new_zeros(())
        acts_BN = F.linear(x_BD, self.w_enc_ND, self.b_enc_N - self.w_enc_ND @ self.b_dec_D).relu() * dead_N
        if self.k_aux < self._whole_latents:
            found = top_k(acts_BN.detach(), min(self.k_aux, self.num_latents))
            kept_BK = self._among_best(found.acts_BK, self.k_aux)
            acts_BN = acts_BN * torch.zeros_like(acts_BN).scatter_(1, found.indices_BK, kept_BK.to(acts_BN.dtype))
        ehat_BD = self._sum(acts_BN @ self.w_dec_ND)
        error_BD, ehat = error_BD.detach(), ehat_BD.detach()
        energy, length = error_BD.square().sum(), ehat.square().sum()
        factor = fitted_length((ehat * error_BD).sum(), length, energy) if self.aux_fitted else 1.0
        misfit = (factor * ehat_BD - error_BD).square().sum() / torch.where(energy > 0, energy, 1.0)
        return torch.where(energy > 0, (dead / self.k_aux).clamp(max=1.0) * misfit, 0.0)

    def _among_best(self, acts_BK: Tensor, k: int) -> Tensor:
        """bool [B, K]: which are among the k best of all ranks; `acts_BK`: a rank's best, decreasing, then by latent."""
        rows, candidates = acts_BK.shape
        all_WBK = acts_BK.new_empty(self._ranks.world * rows, candidates)
        self._ranks.gather_rows_later(acts_BK.contiguous(), all_WBK).wait()
        # In order of rank, then place: equal activations come by ascending latent.
        all_BL = all_WBK.view(-1, rows, candidates).transpose(0, 1).reshape(rows, -1)
        chosen_BK = top_k(all_BL, min(k, all_BL.shape[1]), ordered=False).indices_BK
        best_BL = torch.zeros_like(all_BL, dtype=torch.bool).scatter_(1, chosen_BK, True)
        return best_BL.view(rows, -1, candidates)[:, self._ranks.rank]

    def _sum(self, part: Tensor) -> Tensor:
        out: Tensor = _SumOverRanks.apply(part, self._ranks)  # type: ignore[no-untyped-call]
        return out


class _SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' parts. As every rank has the whole loss, a part's gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        return ranks.sum(part.float().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
