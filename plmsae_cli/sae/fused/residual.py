"""From raw rows to the encoder's input, and from active latents to residuals and the latents' gradients."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from plmsae_cli.sae.fused.pairs import ActivePairs

MOST_HELD = 256
"""Pairs of a token up to which, where tokens differ, their decoder rows are held at once."""


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
def group_of(latent, prefixes, G: tl.constexpr):
    """The smallest prefix that holds the latent."""
    group = latent * 0
    for g in tl.static_range(G - 1):
        group += (latent >= tl.load(prefixes + g)).to(tl.int32)
    return group


@triton.jit
def load_pairs(acts, indices, prefixes, pair, end, G: tl.constexpr):
    """Activations, latents and their groups; 0 from `end` on."""
    act = tl.load(acts + pair, mask=pair < end, other=0.0)
    latent = tl.load(indices + pair, mask=pair < end, other=0)
    return act, latent, group_of(latent, prefixes, G)


@triton.jit
def held_by(prefix, act, group, G: tl.constexpr):
    """Row g: the activations within prefix g, 0 where there is no such prefix. They are bfloat16 already."""
    return tl.where((group[None, :] <= prefix[:, None]) & (prefix[:, None] < G), act[None, :], 0.0).to(tl.bfloat16)


@triton.jit
def of_own_group(slopes, prefix, group):
    """Each pair's slope by the residual of its group."""
    return tl.sum(tl.where(prefix[None, :] == group[:, None], slopes, 0.0), 1)


@triton.jit
def reads(act, pair, end, LISTED: tl.constexpr):
    """Whether a pair's decoder row is read: it is active, or all that is listed has a slope."""
    return pair < end if LISTED else act > 0


@triton.jit
def _held(
    row,
    begin,
    end,
    x,
    w,
    acts,
    indices,
    prefixes,
    residual,
    slope,
    energy,
    d: tl.constexpr,
    rows,
    LISTED: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    PLACES: tl.constexpr,
):
    """A token of up to K pairs, whose decoder rows are held at once, D columns at a time."""
    pair = begin + tl.arange(0, K)
    act, latent, group = load_pairs(acts, indices, prefixes, pair, end, G)
    active = reads(act, pair, end, LISTED)
    rows_of_w = w + latent.to(tl.int64)[:, None] * d
    # Tensor cores want 16 rows: the nested groups, and zeros.
    prefix = tl.arange(0, PLACES)
    held = held_by(prefix, act, group, G)
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
    own = of_own_group(slopes, prefix, group)
    tl.store(slope + pair, tl.where(active, own, 0.0), mask=pair < end)
    tl.store(energy + row, tl.sum(nested, 0))
    tl.store(energy + rows + row, tl.sum(full if G > 1 else nested, 0))


@triton.jit
def _many(
    row,
    begin,
    end,
    x,
    w,
    acts,
    indices,
    prefixes,
    residual,
    slope,
    energy,
    d: tl.constexpr,
    rows,
    LISTED: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    PLACES: tl.constexpr,
):
    """What `_held` computes, for a token of more pairs: the decoder's rows are read twice, K at a time."""
    prefix = tl.arange(0, PLACES)
    later = (prefix[None, :] >= prefix[:, None]).to(tl.float32).to(tl.bfloat16)
    nested = tl.zeros((D,), tl.float32)
    full = tl.zeros((D,), tl.float32)
    for start in range(0, d, D):
        o = start + tl.arange(0, D)
        mask = o < d
        decoded = tl.zeros((PLACES, D), tl.float32)
        for first in range(begin, end, K):
            act, latent, group = load_pairs(acts, indices, prefixes, first + tl.arange(0, K), end, G)
            here = (act > 0)[:, None] & mask[None, :]
            weights = tl.load(w + latent.to(tl.int64)[:, None] * d + o[None, :], mask=here, other=0.0)
            decoded = tl.dot(held_by(prefix, act, group, G), weights, decoded)
        target = tl.load(x + row * d + o, mask=mask, other=0.0).to(tl.float32)
        error = tl.where(prefix[:, None] < G, target[None, :] - decoded, 0.0)
        nested += tl.sum(error * error, 0)
        full += tl.sum(tl.where(prefix[:, None] == G - 1, error * error, 0.0), 0)
        error = error.to(tl.bfloat16)
        if G > 1:
            error = tl.dot(later, error).to(tl.bfloat16)
        out = residual + (row * G + prefix[:, None]) * d + o[None, :]
        tl.store(out, error, mask=mask[None, :] & (prefix[:, None] < G))
    tl.store(energy + row, tl.sum(nested, 0))
    tl.store(energy + rows + row, tl.sum(full, 0))
    tl.debug_barrier()  # other threads of this program read what was stored
    for first in range(begin, end, K):
        pair = first + tl.arange(0, K)
        act, latent, group = load_pairs(acts, indices, prefixes, pair, end, G)
        active = reads(act, pair, end, LISTED)
        slopes = tl.zeros((K, PLACES), tl.float32)
        for start in range(0, d, D):
            o = start + tl.arange(0, D)
            mask = o < d
            here = active[:, None] & mask[None, :]
            weights = tl.load(w + latent.to(tl.int64)[:, None] * d + o[None, :], mask=here, other=0.0)
            places = residual + (row * G + prefix[:, None]) * d + o[None, :]
            error = tl.load(places, mask=mask[None, :] & (prefix[:, None] < G), other=0.0)
            slopes = tl.dot(weights, tl.trans(error), slopes)
        own = of_own_group(slopes, prefix, group)
        tl.store(slope + pair, tl.where(active, own, 0.0), mask=pair < end)


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
    LISTED: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    PLACES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = row * k
    _held(
        row, begin, begin + k, x, w, acts, indices, prefixes, residual, slope, energy, d, rows, LISTED, G, K, D, PLACES
    )


@triton.jit
def _residual_ragged(
    x,
    w,
    acts,
    indices,
    offsets,
    prefixes,
    residual,
    slope,
    energy,
    d: tl.constexpr,
    rows,
    more_than,
    LISTED: tl.constexpr,
    G: tl.constexpr,
    PLACES: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    MORE_K: tl.constexpr,
    MORE_D: tl.constexpr,
    MANY_K: tl.constexpr,
    MANY_D: tl.constexpr,
):
    """Tokens of more than `more_than` pairs, up to K or up to MORE_K; with MANY_K, all that have more as well."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + row).to(tl.int64)
    end = tl.load(offsets + row + 1).to(tl.int64)
    count = end - begin
    if count > more_than:
        if count <= K:
            _held(
                row, begin, end, x, w, acts, indices, prefixes, residual, slope, energy, d, rows, LISTED, G, K, D,
                PLACES,
            )  # fmt: skip
        elif count <= MORE_K:
            _held(
                row, begin, end, x, w, acts, indices, prefixes, residual, slope, energy, d, rows, LISTED, G, MORE_K,
                MORE_D, PLACES,
            )  # fmt: skip
        elif MANY_K > 0:
            _many(
                row, begin, end, x, w, acts, indices, prefixes, residual, slope, energy, d, rows, LISTED, G, MANY_K,
                MANY_D, PLACES,
            )  # fmt: skip


def centre(raw_BD: Tensor, mean_D: Tensor, scale: float, b_dec_D: Tensor, x_BD: Tensor, square_B: Tensor) -> None:
    """x = (raw - mean) * scale - b_dec in bfloat16, and ||(raw - mean) * scale||^2 of each row."""
    rows, d = raw_BD.shape
    assert raw_BD.is_contiguous()
    assert raw_BD.shape == x_BD.shape
    _centre[(rows,)](raw_BD, mean_D, b_dec_D, x_BD, square_B, scale, d, min(1024, triton.next_power_of_2(d)))


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
) -> None:
    """Decode and differentiate with one read of the decoder's rows.

    With r_g = x - sum_{i < m_g} z_i W_dec,i: `residual_BGD`[b, h] = sum_{g >= h} r_g; `slope_P` = <residual of the
    latent's group, W_dec,i>, which is dL/dz over -2, 0 where z is; `energy_2B` = sum_g ||r_g||^2 and ||r_G||^2.

    `smallest`: pairs of a token in the first launch, a power of two of 16 or more, where not their mean; `listed`: pairs
    with activation 0 have a slope, too.
    """
    rows, d = x_BD.shape
    k, groups = len(pairs.acts_P) // rows, residual_BGD.shape[1]
    active = (pairs.acts_P, pairs.indices_P)
    out = (prefixes_G, residual_BGD, slope_P, energy_2B)
    smallest = smallest or pairs_held(k)
    K, D, places = tiles(smallest, groups)
    if pairs.offsets_B1 is None:
        sizes = (d, k, rows, listed, groups, K, D, places)
        _residual[(rows,)](x_BD, w_dec_ND, *active, *out, *sizes, num_warps=1)
        return
    # Tokens by how many pairs they have, two sizes a launch: for more than two, every program would want many registers.
    held = [(smallest, D), *((size, max(16, smallest * D // size)) for size in larger(smallest, most_held))]
    more_than = -1
    for first in range(0, len(held), 2):
        of_two, many = held[first : first + 2], (0, 0)
        if first + 2 >= len(held):
            many = tiles(min(of_two[-1][0], most_held), groups)[:2]
        _residual_ragged[(rows,)](
            x_BD, w_dec_ND, *active, pairs.offsets_B1, *out, d, rows, more_than, listed, groups, places,
            *of_two[0], *of_two[-1], *many, num_warps=1,
        )  # fmt: skip
        more_than = of_two[-1][0]


def larger(smallest: int, most_held: int) -> list[int]:
    """Further sizes of lists that are held at once."""
    return [smallest << i for i in range(1, 4) if smallest << i <= most_held]


def pairs_held(k: int) -> int:
    """Places for k pairs: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(k))


def tiles(K: int, groups: int) -> tuple[int, int, int]:
    """K pairs, columns of a pass, places for the groups."""
    return K, max(16, min(64, 4096 // K)), max(16, triton.next_power_of_2(groups))


def tile_of(d: int, largest: int) -> int:
    """Columns a pass: the power of two up to `largest` that wastes least of `d`, the larger where two do."""
    sizes = [largest >> i for i in range(4) if largest >> i >= 16]
    return min(sizes, key=lambda size: (-(-d // size) * size, -size))
