"""From raw rows to the encoder's input, and from active latents to residuals and the latents' gradients."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _centre(raw, mean, b_dec, x, square, scale, d: tl.constexpr, D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = 0.0
    for start in range(0, d, D):
        o = start + tl.arange(0, D)
        mask = o < d
        value = (tl.load(raw + row * d + o, mask=mask, other=0.0).to(tl.float32) - tl.load(mean + o, mask=mask)) * scale
        value = tl.where(mask, value, 0.0)
        total += tl.sum(value * value, 0)
        value -= tl.load(b_dec + o, mask=mask, other=0.0)
        tl.store(x + row * d + o, value.to(tl.bfloat16), mask=mask)
    tl.store(square + row, total)


@triton.jit
def _residual(
    x,
    w,
    acts,
    indices,
    prefixes,
    residual,
    slope,
    energy,
    d: tl.constexpr,
    k,
    rows,
    G: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    PLACES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, K)
    act = tl.load(acts + row * k + slot, mask=slot < k, other=0.0)
    active = act > 0
    latent = tl.load(indices + row * k + slot, mask=slot < k, other=0)
    group = tl.zeros((K,), tl.int32)
    for g in tl.static_range(G - 1):
        group += (latent >= tl.load(prefixes + g)).to(tl.int32)
    rows_of_w = w + latent.to(tl.int64)[:, None] * d
    # Tensor cores want 16 rows: the nested groups, and zeros. Activations are bfloat16 already.
    prefix = tl.arange(0, PLACES)
    held = tl.where((group[None, :] <= prefix[:, None]) & (prefix[:, None] < G), act[None, :], 0.0).to(tl.bfloat16)
    # Part h answers for the residuals of all prefixes that hold it: h and later.
    later = (prefix[None, :] >= prefix[:, None]).to(tl.float32).to(tl.bfloat16)
    slopes = tl.zeros((K, PLACES), tl.float32)
    nested = tl.zeros((D,), tl.float32)
    full = tl.zeros((D,), tl.float32)
    for start in tl.range(0, d, D, num_stages=3):
        o = start + tl.arange(0, D)
        mask = o < d
        weights = tl.load(rows_of_w + o[None, :], mask=active[:, None] & mask[None, :], other=0.0)
        target = tl.load(x + row * d + o, mask=mask, other=0.0).to(tl.float32)
        error = tl.where(prefix[:, None] < G, target[None, :] - tl.dot(held, weights), 0.0)
        nested += tl.sum(error * error, 0)
        if G > 1:
            full += tl.sum(tl.where(prefix[:, None] == G - 1, error * error, 0.0), 0)
        error = error.to(tl.bfloat16)
        if G > 1:
            error = tl.dot(later, error).to(tl.bfloat16)
        out = residual + (row * G + prefix[:, None]) * d + o[None, :]
        tl.store(out, error, mask=mask[None, :] & (prefix[:, None] < G))
        slopes = tl.dot(weights, tl.trans(error), slopes)
    own = tl.sum(tl.where(prefix[None, :] == group[:, None], slopes, 0.0), 1)
    tl.store(slope + row * k + slot, tl.where(active, own, 0.0), mask=slot < k)
    tl.store(energy + row, tl.sum(nested, 0))
    tl.store(energy + rows + row, tl.sum(full if G > 1 else nested, 0))


def centre(raw_BD: Tensor, mean_D: Tensor, scale: float, b_dec_D: Tensor, x_BD: Tensor, square_B: Tensor) -> None:
    """x = (raw - mean) * scale - b_dec in bfloat16, and ||(raw - mean) * scale||^2 of each row."""
    rows, d = raw_BD.shape
    assert raw_BD.is_contiguous()
    assert raw_BD.shape == x_BD.shape
    _centre[(rows,)](raw_BD, mean_D, b_dec_D, x_BD, square_B, scale, d, min(1024, triton.next_power_of_2(d)))


def residuals(
    x_BD: Tensor,
    w_dec_ND: Tensor,
    acts_BK: Tensor,
    indices_BK: Tensor,
    prefixes_G: Tensor,
    residual_BGD: Tensor,
    slope_BK: Tensor,
    energy_2B: Tensor,
) -> None:
    """Decode and differentiate with one read of the decoder's rows.

    With r_g = x - sum_{i < m_g} z_i W_dec,i: `residual_BGD`[b, h] = sum_{g >= h} r_g; `slope_BK` = <residual of the
    latent's group, W_dec,i>, which is dL/dz over -2, 0 where z is; `energy_2B` = sum_g ||r_g||^2 and ||r_G||^2.
    """
    rows, d = x_BD.shape
    k, groups = acts_BK.shape[1], residual_BGD.shape[1]
    K = max(16, triton.next_power_of_2(k))
    _residual[(rows,)](
        x_BD,
        w_dec_ND,
        acts_BK,
        indices_BK,
        prefixes_G,
        residual_BGD,
        slope_BK,
        energy_2B,
        d,
        k,
        rows,
        groups,
        K,
        max(16, min(64, 4096 // K)),
        max(16, triton.next_power_of_2(groups)),
        num_warps=1,
    )


def tile_of(d: int, largest: int) -> int:
    """Columns a pass: the power of two up to `largest` that wastes least of `d`, the larger where two do."""
    sizes = [largest >> i for i in range(4) if largest >> i >= 16]
    return min(sizes, key=lambda size: (-(-d // size) * size, -size))
