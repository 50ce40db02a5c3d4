"""From active latents to residuals and the latents' gradients: decode and differentiate with one read of the decoder's rows."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from plmsae_cli.sae.fused.nested import held_by, load_pairs, of_own_group, pairs_held, tile_of_pairs
from plmsae_cli.sae.fused.pairs import ActivePairs

MOST_HELD = 256
"""Pairs of a token up to which, where tokens differ, their decoder rows are held at once."""
ONE_WARP = 64
"""Pairs of a token up to which one warp does all."""
PROGRAMS = 2048
"""For the tokens on a list, whose length only the device knows: without any, they end at once."""


class _Batch(NamedTuple):
    """What all programs read and write, as `residuals` has it: pointers inside kernels."""

    x: Tensor
    w: Tensor
    acts: Tensor
    indices: Tensor
    prefixes: Tensor
    residual: Tensor
    slope: Tensor
    energy: Tensor
    rows: int


@triton.jit
def _reads(act, pair, end, LISTED: tl.constexpr):
    """Whether a pair's decoder row is read: it is active, or all that is listed has a slope."""
    return pair < end if LISTED else act > 0


@triton.jit
def _later(prefix):
    """Part h answers for the residuals of all prefixes that hold it: h and later."""
    return (prefix[None, :] >= prefix[:, None]).to(tl.float32).to(tl.bfloat16)


@triton.jit
def _store_energies(batch, row, squares, prefix, G: tl.constexpr):
    """Of squared errors [groups, columns]: the sum of all, and of the last group, whose prefix is the whole."""
    of_group = tl.sum(squares, 1)
    tl.store(batch.energy + row, tl.sum(of_group, 0))
    tl.store(batch.energy + batch.rows + row, tl.sum(tl.where(prefix == G - 1, of_group, 0.0), 0))


@triton.jit
def _held(
    batch, row, begin, end, d: tl.constexpr, LISTED: tl.constexpr, G: tl.constexpr, PLACES: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A token of up to K pairs, whose decoder rows are held at once, D columns at a time."""
    pair = begin + tl.arange(0, K)
    act, latent, group = load_pairs(batch.acts, batch.indices, batch.prefixes, pair, end, G)
    active = _reads(act, pair, end, LISTED)
    rows_of_w = batch.w + latent.to(tl.int64)[:, None] * d
    prefix = tl.arange(0, PLACES)
    held = held_by(prefix, act, group, G)
    later = _later(prefix)
    slopes = tl.zeros((K, PLACES), tl.float32)
    squares = tl.zeros((PLACES, D), tl.float32)  # added up at the end alone, as a sum over threads takes long
    for start in tl.range(0, d, D, num_stages=3):
        o = start + tl.arange(0, D)
        mask = o < d
        weights = tl.load(rows_of_w + o[None, :], mask=active[:, None] & mask[None, :], other=0.0)
        target = tl.load(batch.x + row * d + o, mask=mask, other=0.0).to(tl.float32)
        error = tl.where(prefix[:, None] < G, target[None, :] - tl.dot(held, weights), 0.0)
        squares += error * error
        error = error.to(tl.bfloat16)
        if G > 1:
            error = tl.dot(later, error).to(tl.bfloat16)
        out = batch.residual + (row * G + prefix[:, None]) * d + o[None, :]
        tl.store(out, error, mask=mask[None, :] & (prefix[:, None] < G))
        slopes = tl.dot(weights, tl.trans(error), slopes)
    own = of_own_group(slopes, prefix, group)
    tl.store(batch.slope + pair, tl.where(active, own, 0.0), mask=pair < end)
    _store_energies(batch, row, squares, prefix, G)


@triton.jit
def _many(
    batch, row, begin, end, d: tl.constexpr, LISTED: tl.constexpr, G: tl.constexpr, PLACES: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """What `_held` computes, for a token of more pairs: the decoder's rows are read twice, K at a time."""
    prefix = tl.arange(0, PLACES)
    later = _later(prefix)
    squares = tl.zeros((PLACES, D), tl.float32)
    for start in range(0, d, D):
        o = start + tl.arange(0, D)
        mask = o < d
        decoded = tl.zeros((PLACES, D), tl.float32)
        for first in range(begin, end, K):
            pair = first + tl.arange(0, K)
            act, latent, group = load_pairs(batch.acts, batch.indices, batch.prefixes, pair, end, G)
            here = (act > 0)[:, None] & mask[None, :]
            weights = tl.load(batch.w + latent.to(tl.int64)[:, None] * d + o[None, :], mask=here, other=0.0)
            decoded = tl.dot(held_by(prefix, act, group, G), weights, decoded)
        target = tl.load(batch.x + row * d + o, mask=mask, other=0.0).to(tl.float32)
        error = tl.where(prefix[:, None] < G, target[None, :] - decoded, 0.0)
        squares += error * error
        error = error.to(tl.bfloat16)
        if G > 1:
            error = tl.dot(later, error).to(tl.bfloat16)
        out = batch.residual + (row * G + prefix[:, None]) * d + o[None, :]
        tl.store(out, error, mask=mask[None, :] & (prefix[:, None] < G))
    _store_energies(batch, row, squares, prefix, G)
    tl.debug_barrier()  # other threads of this program read what was stored
    for first in range(begin, end, K):
        pair = first + tl.arange(0, K)
        act, latent, group = load_pairs(batch.acts, batch.indices, batch.prefixes, pair, end, G)
        active = _reads(act, pair, end, LISTED)
        slopes = tl.zeros((K, PLACES), tl.float32)
        for start in range(0, d, D):
            o = start + tl.arange(0, D)
            mask = o < d
            here = active[:, None] & mask[None, :]
            weights = tl.load(batch.w + latent.to(tl.int64)[:, None] * d + o[None, :], mask=here, other=0.0)
            places = batch.residual + (row * G + prefix[:, None]) * d + o[None, :]
            error = tl.load(places, mask=mask[None, :] & (prefix[:, None] < G), other=0.0)
            slopes = tl.dot(weights, tl.trans(error), slopes)
        own = of_own_group(slopes, prefix, group)
        tl.store(batch.slope + pair, tl.where(active, own, 0.0), mask=pair < end)


@triton.jit
def _residual(
    batch, k, d: tl.constexpr, LISTED: tl.constexpr, G: tl.constexpr, PLACES: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin = row * k
    _held(batch, row, begin, begin + k, d, LISTED, G, PLACES, K, D)


@triton.jit
def _by_length(
    batch, offsets, row, longer, d: tl.constexpr, LISTED: tl.constexpr, G: tl.constexpr, PLACES: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, MORE_K: tl.constexpr, MORE_D: tl.constexpr, MANY_K: tl.constexpr,
    MANY_D: tl.constexpr,
):  # fmt: skip
    begin = tl.load(offsets + row).to(tl.int64)
    end = tl.load(offsets + row + 1).to(tl.int64)
    count = end - begin
    if count <= K:
        _held(batch, row, begin, end, d, LISTED, G, PLACES, K, D)
    elif count <= MORE_K:
        _held(batch, row, begin, end, d, LISTED, G, PLACES, MORE_K, MORE_D)
    elif MANY_K > 0:
        _many(batch, row, begin, end, d, LISTED, G, PLACES, MANY_K, MANY_D)
    else:
        # In whatever order: each token is computed alone.
        tl.store(longer + 1 + tl.atomic_add(longer, 1), row.to(tl.int32))


@triton.jit
def _residual_ragged(
    batch, offsets, void, these, longer, d: tl.constexpr, LISTED: tl.constexpr, G: tl.constexpr, PLACES: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, MORE_K: tl.constexpr, MORE_D: tl.constexpr, MANY_K: tl.constexpr,
    MANY_D: tl.constexpr,
):  # fmt: skip
    """Tokens of up to K or up to MORE_K pairs, and with MANY_K of more; without, those are added to the list `longer`.

    Of the list `these`, or where there is none all, each by its program. A list begins with its length.
    """
    if these is not None:
        # Without licm: what it would keep from one token to the next takes registers, and few programs run at once.
        for place in tl.range(tl.program_id(0), tl.load(these), tl.num_programs(0), disable_licm=True):
            row = tl.load(these + 1 + place).to(tl.int64)
            _by_length(batch, offsets, row, longer, d, LISTED, G, PLACES, K, D, MORE_K, MORE_D, MANY_K, MANY_D)
    else:
        wanted = True
        if void is not None:
            wanted = tl.load(void) == 0
        if wanted:
            row = tl.program_id(0).to(tl.int64)
            _by_length(batch, offsets, row, longer, d, LISTED, G, PLACES, K, D, MORE_K, MORE_D, MANY_K, MANY_D)


def residuals(
    x_BD: Tensor,
    w_dec_ND: Tensor,
    pairs: ActivePairs,
    prefixes_G: Tensor,
    residual_BGD: Tensor,
    slope_P: Tensor,
    energy_2B: Tensor,
    most_held: int = MOST_HELD,
    smallest: int | None = None,
    listed: bool = False,
    void: Tensor | None = None,
) -> None:
    """Decode and differentiate with one read of the decoder's rows.

    With r_g = x - sum_{i < m_g} z_i W_dec,i: `residual_BGD`[b, h] = sum_{g >= h} r_g; `slope_P` = <residual of the
    latent's group, W_dec,i>, which is dL/dz over -2, 0 where z is; `energy_2B` = sum_g ||r_g||^2 and ||r_G||^2.

    `smallest`: pairs of a token in the first launch, a power of two of 16 or more, where not their mean; `listed`: pairs
    with activation 0 have a slope, too; `void` (int32, 0-dim): where it is not 0, nothing is written.
    """
    rows, d = x_BD.shape
    k, groups = len(pairs.acts_P) // rows, residual_BGD.shape[1]
    batch = _Batch(
        x_BD, w_dec_ND, pairs.acts_P, pairs.indices_P, prefixes_G, residual_BGD, slope_P, energy_2B, rows
    )  # fmt: skip
    smallest = smallest or pairs_held(k)
    first = tile_of_pairs(smallest, groups)
    fixed = (d, listed, groups, first.places)
    if pairs.offsets_B1 is None:
        _residual[(rows,)](batch, k, *fixed, *first[:2], num_warps=1)
        return
    launches = launches_of(smallest, most_held)
    lists = torch.zeros(len(launches) - 1, 1 + rows, dtype=torch.int32, device=x_BD.device).unbind()
    for (sizes, warps), these, longer in zip(launches, [None, *lists], [*lists, None], strict=True):
        tiles = [columns_held(size, smallest, first.columns) for size in sizes]
        many = (0, 0) if longer is not None else tiles[-1]
        programs = rows if these is None else min(rows, PROGRAMS)
        limit = registers(warps, smallest, groups) if limits_registers(x_BD) else None
        _residual_ragged[(programs,)](
            batch, pairs.offsets_B1, void, these, longer, *fixed, *tiles[0], *tiles[-1], *many, num_warps=warps,
            maxnreg=limit,
        )  # fmt: skip


def limits_registers(tensor: Tensor) -> bool:
    """Whether it lies on an H100 or H200: older GPUs, which multiply from registers, would spill in every loop."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] == 9


def registers(warps: int, smallest: int, groups: int) -> int | None:
    """As many as let 16 programs of one warp (12 with groups), 5 of four or 3 of eight run on a multiprocessor."""
    if warps == 1:
        return None if smallest > 32 else 128 if groups == 1 else 168
    return {4: 96, 8: 80}.get(warps)


def columns_held(size: int, smallest: int, columns: int) -> tuple[int, int]:
    """So many pairs, and columns at a time: with one warp fewer, so that it wants no more registers than the smallest."""
    return size, max(16, smallest * columns // size) if size <= ONE_WARP else max(16, min(64, 8192 // size))


def launches_of(smallest: int, most_held: int) -> list[tuple[list[int], int]]:
    """Sizes of lists that are held at once, by which tokens are told apart, and warps, of each launch.

    `smallest` and its double share a launch of one warp a token: for more sizes, every program would want many registers.
    Longer lists have a warp for every 32 pairs, as one would be at a token long after all others are done.
    """
    sizes = [smallest, *(smallest << i for i in range(1, 4) if smallest << i <= most_held)]
    light, heavy = [size for size in sizes if size <= ONE_WARP], [size for size in sizes if size > ONE_WARP]
    pairs_of_sizes = [(light[i : i + 2], 1) for i in range(0, len(light), 2)]
    return [*pairs_of_sizes, *(([size], max(1, min(8, size // 32))) for size in heavy)]
