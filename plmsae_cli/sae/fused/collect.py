"""Sums over the batch and the dictionary that a step needs before its update: gradient norm, figures, ages."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

FIGURES = ("loss", "reconstruction", "aux", "fvu", "l0", "dead", "grad_norm")
PROGRAMS = 128


@triton.jit
def _one_minus_power(t, decay):
    """1 - exp(-decay t), by its series where the difference would lose digits."""
    y = t * decay
    series = y * (1 - y / 2 * (1 - y / 3 * (1 - y / 4 * (1 - y / 5))))
    return tl.where(y < 0.1, series, 1 - tl.exp(-y))


class Sums(NamedTuple):
    """What `collect` adds up, of this rank's tokens and of the latents whose state it holds: pointers inside it."""

    square_SP: Tensor
    """Parts of the squared gradients' norms of its latents' rows."""
    along_N: Tensor
    grad_b_N: Tensor
    counts_N: Tensor
    """Of all latents whose ages are here, over all tokens; as in `WeightGradients`."""
    grad_b_SD: Tensor
    energy_2B: Tensor
    """Nested and full error by row, and ||x||^2:"""
    square_B: Tensor
    aux: Tensor


@triton.jit
def collect(
    sums, ages, grad_b_dec, more_squares, partial, n, own_first, own, rows, d, window, global_rows, with_centre,
    S: tl.constexpr, SPLITS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """This program's share of: squared gradient, nested error, error, ||x||^2, active pairs, dead, aux; ages move on.

    Sums over latents are over the `own` from `own_first` on; `square_SP` holds theirs alone. `with_centre`: b_dec's count.
    """
    first = tl.program_id(0) * T
    stride = tl.num_programs(0) * T
    o = tl.arange(0, T)
    squares = tl.zeros((T,), tl.float32)
    active = tl.zeros((T,), tl.float32)
    dead = tl.zeros((T,), tl.float32)
    for start in range(first, n, stride):
        latent = start + o
        mask = latent < n
        place = latent - own_first
        mine = mask & (place >= 0) & (place < own)
        for part in tl.static_range(S):
            squares += tl.load(sums.square_SP + part * own + place, mask=mine, other=0.0)
        # Without its part along the decoder row, a gradient is that much shorter.
        parallel = tl.load(sums.along_N + latent, mask=mine, other=0.0)
        bias = tl.load(sums.grad_b_N + latent, mask=mine, other=0.0)
        squares += bias * bias - parallel * parallel
        count = tl.load(sums.counts_N + latent, mask=mask, other=0)
        active += tl.where(mine, count, 0).to(tl.float32)
        age = tl.load(ages + latent, mask=mask, other=0)
        dead += (mine & (age >= window)).to(tl.float32)
        tl.store(ages + latent, tl.where(count > 0, 0, age + global_rows), mask=mask)
    for start in range(first, d, stride):
        column = start + o
        mask = column < d
        total = tl.zeros((T,), tl.float32)
        for split in range(SPLITS):
            total += tl.load(sums.grad_b_SD + split * d + column, mask=mask, other=0.0)
        tl.store(grad_b_dec + column, total, mask=mask)
        squares += total * total * with_centre
    nested = tl.zeros((T,), tl.float32)
    full = tl.zeros((T,), tl.float32)
    inputs = tl.zeros((T,), tl.float32)
    for start in range(first, rows, stride):
        row = start + o
        mask = row < rows
        nested += tl.load(sums.energy_2B + row, mask=mask, other=0.0)
        full += tl.load(sums.energy_2B + rows + row, mask=mask, other=0.0)
        inputs += tl.load(sums.square_B + row, mask=mask, other=0.0)
    out = partial + tl.program_id(0) * 8
    more = tl.where(tl.program_id(0) == 0, tl.load(more_squares), 0.0)
    tl.store(out, tl.sum(squares, 0) + more)
    tl.store(out + 1, tl.sum(nested, 0))
    tl.store(out + 2, tl.sum(full, 0))
    tl.store(out + 3, tl.sum(inputs, 0))
    tl.store(out + 4, tl.sum(active, 0))
    tl.store(out + 5, tl.sum(dead, 0))
    tl.store(out + 6, tl.where(tl.program_id(0) == 0, tl.load(sums.aux), 0.0))


@triton.jit
def finish(
    partial,
    rate,
    step0,
    step1,
    step2,
    step3,
    scalars,
    figures,
    max_norm,
    decay1,
    decay2,
    per_error,
    per_token,
    per_latent,
    share,
    aux_weight,
    norm_unit,
    CLIP: tl.constexpr,
    P: tl.constexpr,
):
    """scalars: rate / (1 - beta1^t), 1 / sqrt(1 - beta2^t), clip factor, is finite, t; figures as `FIGURES`."""
    o = tl.arange(0, P)
    squares = tl.sum(tl.load(partial + o * 8), 0)
    norm = tl.sqrt(tl.where(squares < 0, 0.0, squares))  # by rounding, where all is along the decoder's rows
    finite = norm < float("inf")
    t = tl.load(step0) + tl.where(finite, 1.0, 0.0)
    tl.store(step0, t)
    tl.store(step1, t)
    tl.store(step2, t)
    tl.store(step3, t)
    tl.store(scalars, tl.load(rate) / _one_minus_power(t, decay1))
    tl.store(scalars + 1, 1.0 / tl.sqrt(_one_minus_power(t, decay2)))
    if CLIP:
        tl.store(scalars + 2, 1.0 / tl.maximum(norm / max_norm, 1.0))
    else:
        tl.store(scalars + 2, 1.0)
    tl.store(scalars + 3, tl.where(finite, 1.0, 0.0))
    tl.store(scalars + 4, t)
    nested = tl.sum(tl.load(partial + o * 8 + 1), 0) * per_error
    aux_share = tl.sum(tl.load(partial + o * 8 + 6), 0) * share
    tl.store(figures, nested + tl.load(aux_weight) * aux_share)
    tl.store(figures + 1, nested)
    tl.store(figures + 2, aux_share)
    tl.store(figures + 3, tl.sum(tl.load(partial + o * 8 + 2), 0) / tl.sum(tl.load(partial + o * 8 + 3), 0) * share)
    tl.store(figures + 4, tl.sum(tl.load(partial + o * 8 + 4), 0) * per_token)
    tl.store(figures + 5, tl.sum(tl.load(partial + o * 8 + 5), 0) * per_latent)
    tl.store(figures + 6, norm * norm_unit)
