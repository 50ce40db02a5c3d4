"""`residual` in three parts, between which ranks that hold different latents add up what they reconstruct."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from plmsae_cli.sae.fused.nested import held_by, load_pairs, of_own_group, pairs_held, tile_of_pairs


@triton.jit
def _decode(
    w,
    acts,
    indices,
    prefixes,
    out,
    d: tl.constexpr,
    k,
    G: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    PLACES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    act, latent, group = load_pairs(acts, indices, prefixes, row * k + tl.arange(0, K), (row + 1) * k, G)
    rows_of_w = w + latent.to(tl.int64)[:, None] * d
    prefix = tl.arange(0, PLACES)
    held = held_by(prefix, act, group, G)
    active = act > 0
    for start in tl.range(0, d, D, num_stages=3):
        o = start + tl.arange(0, D)
        mask = o < d
        weights = tl.load(rows_of_w + o[None, :], mask=active[:, None] & mask[None, :], other=0.0)
        sums = tl.dot(held, weights)
        to = out + (row * G + prefix[:, None]) * d + o[None, :]
        tl.store(to, sums, mask=mask[None, :] & (prefix[:, None] < G))


@triton.jit
def _errors(x, xhat, residual, energy, d: tl.constexpr, rows, G: tl.constexpr, D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    nested = tl.zeros((D,), tl.float32)
    full = tl.zeros((D,), tl.float32)
    for start in range(0, d, D):
        o = start + tl.arange(0, D)
        mask = o < d
        target = tl.load(x + row * d + o, mask=mask, other=0.0).to(tl.float32)
        later = tl.zeros((D,), tl.float32)
        for back in tl.static_range(G):
            at = (row * G + (G - 1 - back)) * d + o
            error = target - tl.load(xhat + at, mask=mask, other=0.0)
            nested += error * error
            if back == 0:
                full += error * error
            # Part h answers for the residuals of all prefixes that hold it: h and later.
            later += error.to(tl.bfloat16).to(tl.float32)
            tl.store(residual + at, later.to(tl.bfloat16), mask=mask)
    tl.store(energy + row, tl.sum(nested, 0))
    tl.store(energy + rows + row, tl.sum(full, 0))


@triton.jit
def _slopes(
    w,
    acts,
    indices,
    prefixes,
    residual,
    slope,
    d: tl.constexpr,
    k,
    G: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    PLACES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pair, end = row * k + tl.arange(0, K), (row + 1) * k
    act, latent, group = load_pairs(acts, indices, prefixes, pair, end, G)
    active = act > 0
    rows_of_w = w + latent.to(tl.int64)[:, None] * d
    prefix = tl.arange(0, PLACES)
    slopes = tl.zeros((K, PLACES), tl.float32)
    for start in tl.range(0, d, D, num_stages=3):
        o = start + tl.arange(0, D)
        mask = o < d
        weights = tl.load(rows_of_w + o[None, :], mask=active[:, None] & mask[None, :], other=0.0)
        source = residual + (row * G + prefix[:, None]) * d + o[None, :]
        error = tl.load(source, mask=mask[None, :] & (prefix[:, None] < G), other=0.0)
        slopes = tl.dot(weights, tl.trans(error), slopes)
    own = of_own_group(slopes, prefix, group)
    tl.store(slope + pair, tl.where(active, own, 0.0), mask=pair < end)


def decode(w_dec_ND: Tensor, acts_BK: Tensor, indices_BK: Tensor, prefixes_G: Tensor, out_BGD: Tensor) -> None:
    """`out_BGD`[b, g] = sum over the latents below m_g: z W_dec, float32."""
    (rows, k), d = acts_BK.shape, w_dec_ND.shape[1]
    groups = out_BGD.shape[1]
    sizes = (groups, *tile_of_pairs(pairs_held(k), groups))
    _decode[(rows,)](w_dec_ND, acts_BK, indices_BK, prefixes_G, out_BGD, d, k, *sizes, num_warps=1)


def errors(x_BD: Tensor, xhat_BGD: Tensor, residual_BGD: Tensor, energy_2B: Tensor) -> None:
    """`residual_BGD` and `energy_2B` as in `residual.residuals`, from the reconstructions less b_dec."""
    rows, d = x_BD.shape
    tile = min(1024, triton.next_power_of_2(d))
    _errors[(rows,)](x_BD, xhat_BGD, residual_BGD, energy_2B, d, rows, xhat_BGD.shape[1], tile)


def slopes(
    w_dec_ND: Tensor, acts_BK: Tensor, indices_BK: Tensor, prefixes_G: Tensor, residual_BGD: Tensor, slope_BK: Tensor
) -> None:
    """`slope_BK` as in `residual.residuals`."""
    (rows, k), d = acts_BK.shape, w_dec_ND.shape[1]
    groups = residual_BGD.shape[1]
    sizes = (groups, *tile_of_pairs(pairs_held(k), groups))
    _slopes[(rows,)](w_dec_ND, acts_BK, indices_BK, prefixes_G, residual_BGD, slope_BK, d, k, *sizes, num_warps=1)
