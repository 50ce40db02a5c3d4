"""Linear maps over the active pairs (token, latent) instead of over all B x N products.

With k of N latents active, decoding, its gradients and the encoder's weight gradient touch P = B k pairs.
All are sums of weighted rows, which `embedding_bag` computes in a fixed order: no float atomics, so results
repeat bit for bit. Letters: P pairs, R bags (sums) of the output; the others as in `interface`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_SUM = 0  # embedding_bag's mode


class Pairs:
    """The active pairs, bag by bag: pair p adds latent `indices_P[p]` to bag `bags_P[p]`.

    A bag's pairs are neighbours, `offsets_R1[r]` to `offsets_R1[r + 1]`. The order by latent, which both
    weight gradients need, is sorted once, when it is first asked for. Bags from `num_bags` on hold fillers, whose
    activation is 0 and whose `bags_P` and `indices_P` name any bag and latent.
    """

    def __init__(
        self, indices_P: Tensor, bags_P: Tensor, offsets_R1: Tensor, num_latents: int, num_bags: int | None = None
    ) -> None:
        self.indices_P = indices_P
        self.bags_P = bags_P
        self.offsets_R1 = offsets_R1
        self.num_latents = num_latents
        self.num_bags = offsets_R1.numel() - 1 if num_bags is None else num_bags

    @classmethod
    def of_rows(cls, indices_BK: Tensor, num_latents: int) -> Pairs:
        """One bag a token."""
        count, k = indices_BK.numel(), indices_BK.shape[1]
        positions = torch.arange(count + k, device=indices_BK.device)
        return cls(indices_BK.flatten(), positions[:count] // k, positions[::k].contiguous(), num_latents)

    @classmethod
    def of_mask(cls, mask_BN: Tensor, capacity: int) -> Pairs:
        """One bag a token, of the latents where `mask_BN` is true, in order of index.

        A GPU is not asked how many there are: there the pairs are filled up to `capacity`, and any beyond it lost.
        """
        rows, num_latents = mask_BN.shape
        ends_B = mask_BN.sum(1).cumsum(0)
        offsets_R1 = torch.cat([ends_B.new_zeros(1), ends_B])
        if not mask_BN.is_cuda:
            bags_P, indices_P = mask_BN.nonzero().unbind(1)
            return cls(indices_P, bags_P, offsets_R1, num_latents)
        bags_P, indices_P = mask_BN.nonzero_static(size=capacity).unbind(1)
        place_P = torch.arange(capacity, device=mask_BN.device)
        # Fillers are spread over bags and latents: one long sum would keep a single block of threads busy.
        filler_P = place_P >= ends_B[-1:]
        bags_P = torch.where(filler_P, place_P % rows, bags_P)
        indices_P = torch.where(filler_P, place_P % num_latents, indices_P)
        a_bag = -(-capacity // rows)
        filled_R = ends_B[-1:] + a_bag * torch.arange(1, rows + 1, device=mask_BN.device)
        offsets_R1 = torch.cat([offsets_R1, filled_R]).clamp(max=capacity)
        return cls(indices_P, bags_P, offsets_R1, num_latents, rows)

    def read(self, z_BN: Tensor) -> Tensor:
        """z[bags[p], indices[p]] of every pair, 0 of fillers."""
        acts_P = z_BN.flatten().index_select(0, self.bags_P * self.num_latents + self.indices_P)
        return torch.where(self.real_P, acts_P, 0.0)

    def split(self, group_P: Tensor, groups: int) -> Pairs:
        """Each bag as `groups` bags, of the pairs with each `group_P`, which ascends within a bag."""
        bags_P = self.bags_P * groups + group_P
        counts_R = self.offsets_R1.new_zeros(self.num_bags * groups).scatter_add_(0, bags_P, self.real_P.long())
        ends_R = [self.offsets_R1.new_zeros(1), counts_R.cumsum(0), self.offsets_R1[self.num_bags + 1 :]]
        pairs = Pairs(self.indices_P, bags_P, torch.cat(ends_R), self.num_latents, self.num_bags * groups)
        pairs.by_latent = self.by_latent
        return pairs

    @cached_property
    def real_P(self) -> Tensor:
        """bool: the pairs that are no fillers."""
        return torch.arange(self.indices_P.numel(), device=self.indices_P.device) < self.offsets_R1[self.num_bags]

    def fired(self, acts_P: Tensor) -> Tensor:
        """bool [N]: the latents with an activation above 0."""
        place_P = torch.where(acts_P > 0, self.indices_P, self.num_latents)
        fired_N = torch.zeros(self.num_latents + 1, dtype=torch.bool, device=acts_P.device)
        return fired_N.scatter_(0, place_P, True)[:-1]

    def active(self, acts_P: Tensor) -> Tensor:
        """int64 [R]: activations above 0 in each bag."""
        counts_R = torch.zeros(self.num_bags, dtype=torch.int64, device=acts_P.device)
        return counts_R.scatter_add_(0, self.bags_P, (acts_P > 0).long())

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """The pairs in order of latent [P], and where each latent's pairs begin [N + 1]."""
        # Half the radix passes of int64.
        sorted_P, order_P = self.indices_P.to(torch.int32).sort(stable=True)
        bounds = torch.arange(self.num_latents + 1, dtype=torch.int32, device=sorted_P.device)
        return order_P, torch.searchsorted(sorted_P, bounds)

    @cached_property
    def bags_by_latent(self) -> Tensor:
        """`bags_P` in order of latent."""
        return self.bags_P[self.by_latent[0]]

    def sum_by_bag(self, weights_P: Tensor, rows_ND: Tensor) -> Tensor:
        """out[r] = sum over pairs p of bag r: weights[p] * rows[indices[p]]."""
        return _sums(self.indices_P, rows_ND, self.offsets_R1, weights_P)[: self.num_bags]

    def sum_by_latent(self, weights_P: Tensor, rows_RD: Tensor) -> Tensor:
        """out[i] = sum over pairs p of latent i: weights[p] * rows[bags[p]]: `sum_by_bag` transposed."""
        order_P, bounds_N1 = self.by_latent
        return _sums(self.bags_by_latent, rows_RD, bounds_N1, weights_P[order_P])

    def count_by_latent(self, weights_P: Tensor) -> Tensor:
        """out[i] = sum over pairs p of latent i: weights[p]."""
        order_P, bounds_N1 = self.by_latent
        return _sums(order_P, weights_P.unsqueeze(1), bounds_N1, None).squeeze(1)

    def products(self, rows_RD: Tensor, rows_ND: Tensor) -> Tensor:
        """out[p] = <rows_RD[bags[p]], rows_ND[indices[p]]>."""
        out: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            rows_RD, rows_ND, self.indices_P, self.offsets_R1, self.bags_P, _SUM
        )
        return out


def sparse_decode(acts_P: Tensor, w_dec_ND: Tensor, pairs: Pairs) -> Tensor:
    """xhat[r] = sum over the pairs of bag r: act * W_dec[latent]; differentiable in both tensors."""
    out: Tensor = _Decode.apply(acts_P, w_dec_ND, pairs)  # type: ignore[no-untyped-call]
    return out


def attach_encoder(
    acts_P: Tensor, x_BD: Tensor, w_enc_ND: Tensor, b_enc_N: Tensor, b_dec_D: Tensor, pairs: Pairs
) -> Tensor:
    """`acts_P` themselves, differentiable as ReLU(W_enc (x - b_dec) + b_enc) at the pairs; a bag a token."""
    out: Tensor = _Encode.apply(  # type: ignore[no-untyped-call]
        acts_P, x_BD, w_enc_ND, b_enc_N, b_dec_D, pairs
    )
    return out


def _sums(index: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    return F.embedding_bag(index, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts_P: Tensor, w_dec_ND: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(acts_P, w_dec_ND)
        ctx.pairs = pairs
        return pairs.sum_by_bag(acts_P, w_dec_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        acts_P, w_dec_ND = ctx.saved_tensors
        needs_acts, needs_w, _ = ctx.needs_input_grad
        grad_RD = grad_RD.contiguous()
        return (
            ctx.pairs.products(grad_RD, w_dec_ND) if needs_acts else None,
            ctx.pairs.sum_by_latent(acts_P, grad_RD) if needs_w else None,
            None,
        )


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        acts_P: Tensor,
        x_BD: Tensor,
        w_enc_ND: Tensor,
        b_enc_N: Tensor,
        b_dec_D: Tensor,
        pairs: Pairs,
    ) -> Tensor:
        ctx.save_for_backward(acts_P, x_BD, w_enc_ND, b_dec_D)
        ctx.pairs = pairs
        return acts_P.view_as(acts_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor | None, ...]:
        acts_P, x_BD, w_enc_ND, b_dec_D = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        grad_P = torch.where(acts_P > 0, grad_P, 0.0)
        grad_b_N = pairs.count_by_latent(grad_P)
        return (
            None,
            pairs.sum_by_bag(grad_P, w_enc_ND) if ctx.needs_input_grad[1] else None,
            pairs.sum_by_latent(grad_P, x_BD - b_dec_D),
            grad_b_N,
            -(grad_b_N @ w_enc_ND),
            None,
        )
