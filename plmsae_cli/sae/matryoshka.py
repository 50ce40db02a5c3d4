"""Matryoshka over TopK: nested prefixes of one dictionary, each a reconstruction (Bussmann et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from plmsae_cli.sae.interface import Latents, Losses, Reduce, one_process
from plmsae_cli.sae.sparse import Pairs, sparse_decode
from plmsae_cli.sae.topk import TopK

DEFAULT_FRACTIONS = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)


class MatryoshkaTopK(TopK):
    """TopK with the loss mean_g ||x - xhat_g||^2: xhat_g decodes the active latents with index below m_g."""

    prefixes_G: Tensor

    def __init__(
        self,
        d: int,
        num_latents: int,
        k: int,
        k_aux: int | None = None,
        aux_coefficient: float = 1 / 32,
        fractions: Sequence[float] = DEFAULT_FRACTIONS,
    ) -> None:
        """`fractions`: each group's share of the latents, in order of index, summing to 1.

        Raises ValueError where they do not, or where a group would hold no latent.
        """
        super().__init__(d, num_latents, k, k_aux, aux_coefficient)
        self.fractions = tuple(fractions)
        if abs(sum(self.fractions) - 1) > 1e-3:
            raise ValueError(f"fractions {list(fractions)} sum to {sum(fractions):.4f}: make them sum to 1")
        prefixes = [round(share * num_latents) for share in accumulate(self.fractions)]
        prefixes[-1] = num_latents
        if any(after <= before for before, after in pairwise([0, *prefixes])):
            raise ValueError(
                f"fractions {list(fractions)} of {num_latents} latents leave a group empty: "
                "enlarge the fraction or num_latents"
            )
        self.register_buffer("prefixes_G", torch.tensor(prefixes), persistent=False)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""
        return super().settings() | {"fractions": list(self.fractions)}

    def loss(self, x_BD: Tensor, dead_N: Tensor, global_rows: int, reduce: Reduce = one_process) -> Losses:
        """mean_g sum ||x - xhat_g||^2 / (B_global d) + aux_coefficient * AuxK on the full residual."""
        selected = self._select(x_BD)
        indices_BK, order_BK = selected.indices_BK.sort(dim=1)
        selected = Latents(selected.acts_BK.gather(1, order_BK), indices_BK)
        grouped = self._pairs_of_groups(indices_BK)
        # The encoder sums by token, the decoder by token and group; the order by latent is the same for both.
        pairs = Pairs.of_rows(indices_BK, self.num_latents)
        pairs.by_latent = grouped.by_latent

        parts_RD = sparse_decode(self._attach(selected, x_BD, pairs), self.w_dec_ND, grouped)
        parts_BGD = parts_RD.view(-1, len(self.fractions), self.d)
        error, xhat_BD = _NestedError.apply(parts_BGD, self.b_dec_D, x_BD)  # type: ignore[no-untyped-call]
        reconstruction = error / (len(self.fractions) * global_rows * self.d)
        return self._with_aux(reconstruction, x_BD, selected, xhat_BD, dead_N, reduce)

    def _pairs_of_groups(self, indices_BK: Tensor) -> Pairs:
        """Bag b G + g holds the latents of token b in group g; `indices_BK` ascends within a row."""
        rows, k = indices_BK.shape
        groups = len(self.fractions)
        rows_B1 = torch.arange(rows, device=indices_BK.device).unsqueeze(1)
        group_BK = torch.searchsorted(self.prefixes_G, indices_BK, right=True)
        ends_BG = torch.searchsorted(indices_BK, self.prefixes_G.expand(rows, groups).contiguous())
        offsets_R1 = torch.cat([rows_B1.new_zeros(1), (rows_B1 * k + ends_BG).flatten()])
        bags_P = (rows_B1 * groups + group_BK).flatten()
        return Pairs(indices_BK.flatten(), bags_P, offsets_R1, self.num_latents)


class _NestedError(torch.autograd.Function):
    """sum_g ||x - xhat_g||^2 over all tokens, xhat_g = b_dec + the parts up to g; and xhat_G, a constant.

    With r_g = xhat_g - x, the gradient of part h is 2 sum_{g >= h} r_g: a running sum each way.
    """

    @staticmethod
    def forward(ctx: Any, parts_BGD: Tensor, b_dec_D: Tensor, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        residuals_BGD = torch.empty_like(parts_BGD)
        last_BD = b_dec_D - x_BD
        for group, residual_BD in enumerate(residuals_BGD.unbind(1)):
            last_BD = torch.add(last_BD, parts_BGD[:, group], out=residual_BD)
        xhat_BD = last_BD + x_BD
        ctx.save_for_backward(residuals_BGD)
        ctx.mark_non_differentiable(xhat_BD)
        return torch.linalg.vecdot(residuals_BGD, residuals_BGD).sum(), xhat_BD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (residuals_BGD,) = ctx.saved_tensors
        grads_BGD = residuals_BGD * (2 * grad)
        sums_BD = grads_BGD.unbind(1)
        for before_BD, after_BD in pairwise(reversed(sums_BD)):
            after_BD.add_(before_BD)
        return grads_BGD, sums_BD[0].sum(0), None
