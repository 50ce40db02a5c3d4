"""The two halves of a UNet's block as operations that a compiler leaves as they are, with gradients of their own.

`attend` is attention of rms_norm(x) up to what the output matrix takes, `feed` the feed-forward layer of rms_norm(x). Neither
the normed stream nor anything between is stored that the backward does not read. From sm90 on, in bf16.

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
from plmsae_cli.plm.whole import backward_documents

WHOLE = True
"""Whether attention's backward has a program for each document, where they are short enough."""
_COLUMNS = 64
"""One-hot columns."""


def squares_of(x_TD: Tensor) -> Tensor:
    """Sums of squares of rows, float32 [T, 1]; no gradient goes through them."""
    return x_TD.detach().float().square().sum(-1, keepdim=True)


def _norm_squared(squares_TP: Tensor, width: int) -> Tensor:
    """1 / (mean square + eps) [T]."""
    return 1 / (squares_TP.sum(1) / width + EPSILON)


# The feed-forward layer


@torch.library.custom_op("plmsae::feed", mutates_args=())
def _feed(x_TD: Tensor, squares_TP: Tensor, up_FD: Tensor, down_DF: Tensor) -> tuple[Tensor, Tensor]:
    squared_TF = products.up(x_TD, squares_TP, up_FD)
    return squared_TF @ down_DF.mT, squared_TF


@_feed.register_fake
def _(x_TD: Tensor, squares_TP: Tensor, up_FD: Tensor, down_DF: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TD), x_TD.new_empty(len(x_TD), len(up_FD))


@torch.library.custom_op("plmsae::feed_slopes", mutates_args=())
def _feed_slopes(grad_TD: Tensor, down_DF: Tensor, squared_TF: Tensor, squares_TP: Tensor) -> tuple[Tensor, Tensor]:
    slopes_TF, sums_TP = products.slopes(grad_TD.contiguous(), down_DF, squared_TF, squares_TP)
    return slopes_TF, sums_TP.sum(1)


@_feed_slopes.register_fake
def _(grad_TD: Tensor, down_DF: Tensor, squared_TF: Tensor, squares_TP: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(squared_TF), squares_TP.new_empty(len(squares_TP))


def _remember_feed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _feed_gradients(ctx: Any, grad_TD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x_TD, squares_TP, up_FD, down_DF, squared_TF = ctx.saved_tensors
    slopes_TF, along_T = _feed_slopes(grad_TD, down_DF, squared_TF, squares_TP)
    width = x_TD.shape[1]
    share_T = along_T * _norm_squared(squares_TP, width) / width
    d_x_TD = (slopes_TF @ up_FD).float() - x_TD.float() * share_T[:, None]
    return d_x_TD.to(x_TD.dtype), None, slopes_TF.mT @ x_TD, grad_TD.mT @ squared_TF


_feed.register_autograd(_feed_gradients, setup_context=_remember_feed)


def feed(x_TD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """relu(rms_norm(x) upᵀ)^2 downᵀ [T, D]; all in one dtype."""
    return cast(Tensor, _feed(x_TD, squares_of(x_TD), up_FD, down_DF)[0])


# Attention


@torch.library.custom_op("plmsae::attend", mutates_args=())
def _attend(
    x_TD: Tensor, squares_TP: Tensor, weight_3DD: Tensor, table_VD: Tensor | None, tokens_T: Tensor,
    position_T: Tensor, cos: Tensor, sin: Tensor, tiles: Tensor, heads: int, window: int, cap: float, whole: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    qkv, scales_T2H = products.queries(
        x_TD, squares_TP, weight_3DD, table_VD, tokens_T, position_T, cos, sin, heads
    )
    return *forward(*qkv.unbind(1), tiles, window, cap), qkv, scales_T2H


@_attend.register_fake
def _(
    x_TD: Tensor, squares_TP: Tensor, weight_3DD: Tensor, table_VD: Tensor | None, tokens_T: Tensor,
    position_T: Tensor, cos: Tensor, sin: Tensor, tiles: Tensor, heads: int, window: int, cap: float, whole: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    num_tokens, width = x_TD.shape
    out = x_TD.new_empty(num_tokens, heads, width // heads)
    single = {"dtype": torch.float32}
    return (
        out,
        x_TD.new_empty(heads, num_tokens, **single),
        x_TD.new_empty(num_tokens, 3, heads, width // heads),
        x_TD.new_empty(num_tokens, 2 * heads, **single),
    )


@torch.library.custom_op("plmsae::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scales_T2H: Tensor, norm_T: Tensor, cos: Tensor, sin: Tensor,
    tiles: Tensor, window: int, cap: float, whole: bool,
) -> Tensor:  # fmt: skip
    turned, grad = Turned(scales_T2H, norm_T, cos, sin), grad.contiguous()
    if whole:
        return backward_documents(grad, qkv, out, lse, tiles, window, cap, turned)
    found = torch.empty_like(qkv)
    backward(grad, *qkv.unbind(1), out, lse, tiles, window, cap, list(found.unbind(1)), turned)
    return found


@_attend_backward.register_fake
def _(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scales_T2H: Tensor, norm_T: Tensor, cos: Tensor, sin: Tensor,
    tiles: Tensor, window: int, cap: float, whole: bool,
) -> Tensor:  # fmt: skip
    return torch.empty_like(qkv)


def _remember_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.window, ctx.cap, ctx.whole = inputs
    ctx.mixed = inputs[3] is not None
    ctx.rows = inputs[3].shape[0] if ctx.mixed else 0
    x_TD, squares_TP, weight_3DD, _, tokens_T, _, cos, sin, tiles = tensors
    ctx.save_for_backward(x_TD, squares_TP, weight_3DD, tokens_T, cos, sin, tiles, *output)
    ctx.mark_non_differentiable(*output[1:])


def _attend_gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x_TD, squares_TP, weight_3DD, tokens_T, cos, sin, tiles, out, lse, qkv, scales_T2H = ctx.saved_tensors
    width = x_TD.shape[1]
    norm_T = _norm_squared(squares_TP, width).sqrt()
    d_qkv = _attend_backward(
        grad, qkv, out, lse, scales_T2H, norm_T, cos, sin, tiles, ctx.window, ctx.cap, ctx.whole
    ).flatten(1)
    d_normed_TD = (d_qkv @ weight_3DD.flatten(0, 1)).float()
    x = x_TD.float()
    share_T = (x * d_normed_TD).sum(-1) * norm_T.square() / width
    d_x_TD = (d_normed_TD - x * share_T[:, None]).to(x_TD.dtype)
    d_weight = (d_qkv.mT @ x_TD).view_as(weight_3DD)
    d_table = None
    if ctx.mixed:
        # Gradients of v come times the norm. Its inverse in two parts is as good as float32.
        hot_TV = (tokens_T[:, None] == torch.arange(_COLUMNS, device=x_TD.device)) / norm_T[:, None]
        first_TV = hot_TV.to(x_TD.dtype)
        parts = torch.cat([first_TV, (hot_TV - first_TV).to(x_TD.dtype)], dim=1)
        summed = (parts.mT @ d_qkv[:, 2 * width :]).float()
        d_table = (summed[: ctx.rows] + summed[_COLUMNS : _COLUMNS + ctx.rows]).to(x_TD.dtype)
    return d_x_TD, None, d_weight, d_table, *[None] * 9


_attend.register_autograd(_attend_gradients, setup_context=_remember_attend)


def attend(
    x_TD: Tensor,
    weight_3DD: Tensor,
    table_VD: Tensor | None,
    tokens_T: Tensor,
    position_T: Tensor,
    rope: tuple[Tensor, Tensor],
    tiles: Tensor,
    num_heads: int,
    window: int = 0,
    cap: float = 0.0,
    whole: bool = True,
) -> Tensor:
    """Attention [T, H, Dh] of q, k and v = rms_norm(x) Wᵀ, q and k normed and turned, v with table[tokens] added.

    `rope`: tables of positions, fp32 [L, 1, Dh / 2]; `position`: of each token in its document; at most 64 rows in the
    table. `whole`: no document has more than some thousand tokens.
    """
    return cast(
        Tensor,
        _attend(
            x_TD, squares_of(x_TD), weight_3DD, table_VD, tokens_T, position_T, *rope, tiles, num_heads, window, cap,
            whole and WHOLE,
        )[0],
    )  # fmt: skip
