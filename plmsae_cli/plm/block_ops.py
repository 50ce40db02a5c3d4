"""The two halves of a UNet's block as operations that a compiler leaves as they are, with gradients of their own.

`attend` adds attention of rms_norm(x) to x, `feed` the feed-forward layer of rms_norm(x). Neither the normed stream nor
anything between is stored that the backward does not read. For the H100 and H200, in bf16.

Shape letters: T tokens of the pack, D residual width, F feed-forward width, H heads, Dh width of a head, V vocabulary, P parts
of a sum of squares.
"""

# mypy: disable-error-code="no-untyped-call, no-untyped-def"
from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from plmsae_cli.plm import products
from plmsae_cli.plm.flash import Turned, backward, forward
from plmsae_cli.plm.gradients import EPSILON

_COLUMNS = 64
"""One-hot columns."""


def squares_of(x_TD: Tensor) -> Tensor:
    """Sums of squares of rows, float32 [T, 1]; no gradient goes through them."""
    return x_TD.detach().float().square().sum(-1, keepdim=True)


def _norms(squares_TP: Tensor, width: int) -> Tensor:
    """1 / sqrt(mean square + eps) [T]."""
    return (squares_TP.sum(1) / width + EPSILON).rsqrt()


def _through_norm(grad_TD: Tensor, d_normed_TD: Tensor, x_TD: Tensor, norm_T: Tensor) -> Tensor:
    """`grad`, and through rms_norm(x) that of the normed stream, which comes times the norm."""
    d, x = d_normed_TD.float(), x_TD.float()
    share_T = (x * d).sum(-1) * norm_T.square() / x.shape[1]
    return (grad_TD.float() + d - x * share_T[:, None]).to(x_TD.dtype)


# The feed-forward layer


@torch.library.custom_op("plmsae::feed", mutates_args=())
def _feed(x_TD: Tensor, squares_TP: Tensor, up_FD: Tensor, down_DF: Tensor) -> tuple[Tensor, Tensor]:
    squared_TF = products.up(x_TD, squares_TP, up_FD)
    return products.added(x_TD, squared_TF, down_DF)[0], squared_TF


@_feed.register_fake
def _(x_TD: Tensor, squares_TP: Tensor, up_FD: Tensor, down_DF: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TD), x_TD.new_empty(len(x_TD), len(up_FD))


@torch.library.custom_op("plmsae::feed_slopes", mutates_args=())
def _feed_slopes(grad_TD: Tensor, down_DF: Tensor, squared_TF: Tensor, squares_TP: Tensor) -> Tensor:
    return products.slopes(grad_TD.contiguous(), down_DF, squared_TF, squares_TP)


@_feed_slopes.register_fake
def _(grad_TD: Tensor, down_DF: Tensor, squared_TF: Tensor, squares_TP: Tensor) -> Tensor:
    return torch.empty_like(squared_TF)


def _remember_feed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _feed_gradients(ctx: Any, grad_TD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x_TD, squares_TP, up_FD, down_DF, squared_TF = ctx.saved_tensors
    slopes_TF = _feed_slopes(grad_TD, down_DF, squared_TF, squares_TP)
    d_x_TD = _through_norm(grad_TD, slopes_TF @ up_FD, x_TD, _norms(squares_TP, x_TD.shape[1]))
    return d_x_TD, None, slopes_TF.mT @ x_TD, grad_TD.mT @ squared_TF


_feed.register_autograd(_feed_gradients, setup_context=_remember_feed)


def feed(x_TD: Tensor, squares_TP: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """x + relu(rms_norm(x) upᵀ)^2 downᵀ [T, D], by parts of x's sums of squares; all in one dtype."""
    return cast(Tensor, _feed(x_TD, squares_TP, up_FD, down_DF)[0])


# Attention


@torch.library.custom_op("plmsae::attend", mutates_args=())
def _attend(
    x_TD: Tensor, squares_TP: Tensor, weight_3DD: Tensor, out_DD: Tensor, table_VD: Tensor | None, tokens_T: Tensor,
    position_T: Tensor, cos: Tensor, sin: Tensor, tiles: Tensor, heads: int, window: int, cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    qkv, scales_T2H = products.queries(x_TD, squares_TP, weight_3DD, table_VD, tokens_T, position_T, cos, sin, heads)
    q, k, v = qkv.unbind(1)
    mixed, lse = forward(q, k, v, tiles, window, cap, described=True, normed=True)
    return *products.added(x_TD, mixed.flatten(1), out_DD), mixed, lse, qkv, scales_T2H


@_attend.register_fake
def _(
    x_TD: Tensor, squares_TP: Tensor, weight_3DD: Tensor, out_DD: Tensor, table_VD: Tensor | None, tokens_T: Tensor,
    position_T: Tensor, cos: Tensor, sin: Tensor, tiles: Tensor, heads: int, window: int, cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    num_tokens, width = x_TD.shape
    return (
        torch.empty_like(x_TD),
        x_TD.new_empty(num_tokens, -(-width // products.ADDED.columns), dtype=torch.float32),
        x_TD.new_empty(num_tokens, heads, width // heads),
        x_TD.new_empty(heads, num_tokens, dtype=torch.float32),
        x_TD.new_empty(num_tokens, 3, heads, width // heads),
        x_TD.new_empty(num_tokens, 2 * heads, dtype=torch.float32),
    )


@torch.library.custom_op("plmsae::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, qkv: Tensor, mixed: Tensor, lse: Tensor, scales_T2H: Tensor, norm_T: Tensor, cos: Tensor, sin: Tensor,
    tiles: Tensor, window: int, cap: float,
) -> Tensor:  # fmt: skip
    found, (q, k, v) = torch.empty_like(qkv), qkv.unbind(1)
    backward(
        grad.contiguous(), q, k, v, mixed, lse, tiles, window, cap, list(found.unbind(1)),
        Turned(scales_T2H, norm_T, cos, sin), described=True,
    )  # fmt: skip
    return found


@_attend_backward.register_fake
def _(
    grad: Tensor, qkv: Tensor, mixed: Tensor, lse: Tensor, scales_T2H: Tensor, norm_T: Tensor, cos: Tensor, sin: Tensor,
    tiles: Tensor, window: int, cap: float,
) -> Tensor:  # fmt: skip
    return torch.empty_like(qkv)


def _remember_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.window, ctx.cap = inputs
    x_TD, squares_TP, weight_3DD, out_DD, table_VD, tokens_T, _, cos, sin, tiles = tensors
    ctx.rows = None if table_VD is None else len(table_VD)
    ctx.save_for_backward(x_TD, squares_TP, weight_3DD, out_DD, tokens_T, cos, sin, tiles, *output[2:])
    ctx.mark_non_differentiable(*output[1:])


def _attend_gradients(ctx: Any, grad_TD: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x_TD, squares_TP, weight_3DD, out_DD, tokens_T, cos, sin, tiles, mixed, lse, qkv, scales_T2H = ctx.saved_tensors
    width = x_TD.shape[1]
    norm_T = _norms(squares_TP, width)
    d_mixed = (grad_TD @ out_DD).view_as(mixed)
    d_qkv = _attend_backward(
        d_mixed, qkv, mixed, lse, scales_T2H, norm_T, cos, sin, tiles, ctx.window, ctx.cap
    ).flatten(1)
    d_x_TD = _through_norm(grad_TD, d_qkv @ weight_3DD.flatten(0, 1), x_TD, norm_T)
    d_weight = (d_qkv.mT @ x_TD).view_as(weight_3DD)
    d_table = None
    if ctx.rows is not None:
        # Gradients of v come times the norm. Its inverse in two parts is as good as float32.
        hot_TV = (tokens_T[:, None] == torch.arange(_COLUMNS, device=x_TD.device)) / norm_T[:, None]
        first_TV = hot_TV.to(x_TD.dtype)
        parts = torch.cat([first_TV, (hot_TV - first_TV).to(x_TD.dtype)], dim=1)
        summed = (parts.mT @ d_qkv[:, 2 * width :]).float()
        d_table = (summed[: ctx.rows] + summed[_COLUMNS : _COLUMNS + ctx.rows]).to(x_TD.dtype)
    return d_x_TD, None, d_weight, grad_TD.mT @ mixed.flatten(1), d_table, *[None] * 8


_attend.register_autograd(_attend_gradients, setup_context=_remember_attend)


def attend(
    x_TD: Tensor,
    weight_3DD: Tensor,
    out_DD: Tensor,
    table_VD: Tensor | None,
    tokens_T: Tensor,
    position_T: Tensor,
    rope: tuple[Tensor, Tensor],
    tiles: Tensor,
    num_heads: int,
    window: int = 0,
    cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(x + attention outᵀ [T, D], parts of the sums of its squares, float32 [T, P]); attention of q, k and v = rms_norm(x) Wᵀ,
    q and k normed and turned, v with table[tokens] added.

    `rope`: tables of positions, fp32 [L, 1, Dh / 2]; `position`: of each token in its document; at most 64 rows in the table.
    """
    assert table_VD is None or len(table_VD) <= _COLUMNS
    found = _attend(
        x_TD, squares_of(x_TD), weight_3DD, out_DD, table_VD, tokens_T, position_T, *rope, tiles, num_heads, window, cap
    )  # fmt: skip
    return cast("tuple[Tensor, Tensor]", found[:2])
