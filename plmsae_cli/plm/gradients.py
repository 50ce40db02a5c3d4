"""Small operations whose gradients autograd would compute slowly, or in another order each time.

Shape letters: T tokens, M chosen tokens, V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 2.0**-23
"""Of `rms_norm`."""
_COLUMNS = 64
"""One-hot columns: tensor cores want a multiple of 8."""


class _Lookup(torch.autograd.Function):
    """Rows of a small table. Backward: one-hot tokens times the gradient, a matrix product in a fixed order, where
    autograd would add up thousands of rows atomically in 33 places."""

    @staticmethod
    def forward(ctx: Any, table_VD: Tensor, tokens_T: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_T)
        ctx.rows = table_VD.shape[0]
        return table_VD[tokens_T]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (tokens_T,) = ctx.saved_tensors
        grad_TD = gradients[0]
        hot_TV = (tokens_T[:, None] == torch.arange(_COLUMNS, device=tokens_T.device)).to(grad_TD.dtype)
        return (hot_TV.mT @ grad_TD)[: ctx.rows], None


class _Taken(torch.autograd.Function):
    """Rows of x at different places. Backward writes instead of adding."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, places_M: Tensor) -> Tensor:
        ctx.save_for_backward(places_M)
        ctx.shape = x_TD.shape
        return x_TD.index_select(0, places_M)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (places_M,) = ctx.saved_tensors
        grad_MD = gradients[0]
        return grad_MD.new_zeros(ctx.shape).index_copy_(0, places_M, grad_MD), None


def lookup(table_VD: Tensor, tokens_T: Tensor) -> Tensor:
    """table[tokens], [T, D]; at most 64 rows in the table."""
    assert table_VD.shape[0] <= _COLUMNS
    return cast(Tensor, _Lookup.apply(table_VD, tokens_T))  # type: ignore[no-untyped-call]


def scaled(x_TD: Tensor, weight: Tensor) -> Tensor:
    """x times a 0-dim weight, in the dtype of x; multiplied, and its gradient summed, in float32 or wider.

    The weight is spread over tokens first, so that its gradient is summed row by row, which fuses with other passes over rows.
    It is autograd's own, since torch 2.11's compiler drops the gradients of a `Function` that ends in a conversion to the
    dtype that its result has already.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    return (x_TD.to(wide) * weight.to(wide).expand(len(x_TD), 1)).to(x_TD.dtype)


def taken(x_TD: Tensor, places_M: Tensor) -> Tensor:
    """x[places], [M, D]; no place may occur twice."""
    return cast(Tensor, _Taken.apply(x_TD, places_M))  # type: ignore[no-untyped-call]


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean of x^2 + eps) over the last dimension (Zhang & Sennrich 2019), without weights.

    eps is 2^-23 in every dtype, torch's own for all but float64: a stream that is 0 at `<mask>` has gradients of its inverse.
    """
    return F.rms_norm(x, (x.shape[-1],), eps=EPSILON)
