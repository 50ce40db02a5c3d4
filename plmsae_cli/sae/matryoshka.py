"""Matryoshka: nested prefixes of one dictionary, each a reconstruction (Bussmann et al. 2025, arXiv 2503.17547)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from plmsae_cli.sae.batch_topk import BatchTopK, Selection
from plmsae_cli.sae.interface import Reduce
from plmsae_cli.sae.sparse import Pairs, sparse_decode
from plmsae_cli.sae.topk import TopK

DEFAULT_FRACTIONS = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)


class _Nested(TopK):
    """The loss mean_g ||x - xhat_g||^2: xhat_g decodes the active latents with index below m_g."""

    prefixes_G: Tensor
    fractions: tuple[float, ...]

    def _nest(self, fractions: Sequence[float]) -> None:
        """Set the prefixes from each group's share of the latents, in order of index, summing to 1.

        Raises ValueError where they do not, or where a group would hold no latent.
        """
        self.fractions = tuple(fractions)
        if abs(sum(self.fractions) - 1) > 1e-3:
            raise ValueError(f"fractions {list(fractions)} sum to {sum(fractions):.4f}: make them sum to 1")
        prefixes = [round(share * self.num_latents) for share in accumulate(self.fractions)]
        prefixes[-1] = self.num_latents
        if any(after <= before for before, after in pairwise([0, *prefixes])):
            raise ValueError(
                f"fractions {list(fractions)} of {self.num_latents} latents leave a group empty: "
                "enlarge the fraction or num_latents"
            )
        self.prefixes = tuple(prefixes)
        self.register_buffer("prefixes_G", torch.tensor(prefixes), persistent=False)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""
        return super().settings() | {"fractions": list(self.fractions)}

    def _error(self, acts_P: Tensor, x_BD: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """mean_g sum ||x - xhat_g||^2, and the whole reconstruction; pairs ascend in index within a token."""
        groups = len(self.fractions)
        group_P = torch.searchsorted(self.prefixes_G, pairs.indices_P, right=True)
        parts_RD = sparse_decode(acts_P, self.w_dec_ND, pairs.split(group_P, groups))
        error, xhat_BD = NestedError.apply(  # type: ignore[no-untyped-call]
            parts_RD.view(-1, groups, self.d), self.b_dec_D, x_BD
        )
        return error / groups, xhat_BD


class MatryoshkaTopK(_Nested):
    """TopK with nested prefixes."""

    def __init__(
        self,
        d: int,
        num_latents: int,
        k: int,
        k_aux: int | None = None,
        aux_coefficient: float = 1 / 32,
        k_start: int | None = None,
        k_anneal: float = 0.1,
        fractions: Sequence[float] = DEFAULT_FRACTIONS,
    ) -> None:
        """`fractions`: each group's share of the latents, in order of index, summing to 1.

        Raises ValueError where they do not, or where a group would hold no latent.
        """
        super().__init__(d, num_latents, k, k_aux, aux_coefficient, k_start, k_anneal)
        self._nest(fractions)

    def _choose(self, x_BD: Tensor, global_rows: int, reduce: Reduce) -> tuple[Tensor, Pairs]:
        selected = self._select(x_BD, self.training_k)
        indices_BK, order_BK = selected.indices_BK.sort(dim=1)
        return selected.acts_BK.gather(1, order_BK).flatten(), Pairs.of_rows(indices_BK, self.num_latents)


class MatryoshkaBatchTopK(_Nested, BatchTopK):
    """BatchTopK with nested prefixes."""

    def __init__(
        self,
        d: int,
        num_latents: int,
        k: int,
        k_aux: int | None = None,
        aux_coefficient: float = 1 / 32,
        k_start: int | None = None,
        k_anneal: float = 0.1,
        selection: Selection = "global",
        fractions: Sequence[float] = DEFAULT_FRACTIONS,
    ) -> None:
        """As `BatchTopK`, and `fractions`: each group's share of the latents, in order of index, summing to 1.

        Raises ValueError where they do not, or where a group would hold no latent.
        """
        BatchTopK.__init__(self, d, num_latents, k, k_aux, aux_coefficient, k_start, k_anneal, selection)
        self._nest(fractions)


class NestedError(torch.autograd.Function):
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
