"""The B k largest scores of a batch, exactly: what `batch_selection.keep_largest` keeps, in four short kernels.

All scores are read once, for the maxima of groups of neighbouring latents. Where B k of those maxima reach a value, so do
B k scores; as well where B k maxima of some groups each do. The B k-th largest of these bounds the threshold from below, and
from then on only groups that reach the bound are read. A histogram of what reaches it (32,768 bins, one for each positive
bfloat16) gives the threshold and how many equal to it are kept; integer sums, so any order of the additions gives the same.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from plmsae_cli.sae.fused.bound import DIGIT_BITS, DIGITS, Bound
from plmsae_cli.sae.fused.listed import GroupLists, counts_up_to, load_listed, store_pairs
from plmsae_cli.sae.fused.pairs import ActivePairs
from plmsae_cli.sae.fused.top_k import maxima_of_groups, members_of_group
from plmsae_cli.sae.ranks import Ranks

COPIES = 8
"""Of the histogram, each for some of the tokens: most scores fall into few bins, where additions queue."""
BINS = 1 << DIGITS * DIGIT_BITS
"""Positive values of bfloat16, zero included."""
BLOCKS = 128
"""Of neighbouring bins that are added up together."""
ROWS_AT_ONCE = 4096
SCORES_A_TILE = 1024


@triton.jit
def _bin(copy, key):
    """Where a key is counted: neighbours far apart, so that additions to them do not queue for the same sector."""
    return copy * 32768 + (key & 63) * 512 + (key >> 6)


@triton.jit
def _histogram(
    scores, lists, lengths, bound, bins, n, groups, MEMBERS: tl.constexpr, TILE: tl.constexpr, COPIES: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    low = tl.maximum(tl.load(bound), 1)
    length = tl.load(lengths + row)
    for first in range(0, length, TILE):
        _, scored, _ = load_listed(scores, lists, row, first + tl.arange(0, TILE), length, groups, n, MEMBERS)
        keys = scored.to(tl.int32)
        tl.atomic_add(bins + _bin(row % COPIES, keys), 1, mask=keys >= low, sem="relaxed")


@triton.jit
def _fold(bins, reached, BINS: tl.constexpr, COPIES: tl.constexpr, BLOCKS: tl.constexpr):
    """The sum of the copies, in order of the keys, and this block's."""
    block = tl.program_id(0)
    key = block * (BINS // BLOCKS) + tl.arange(0, BINS // BLOCKS)
    copy = tl.arange(0, COPIES)
    counts = tl.sum(tl.load(bins + _bin(copy[:, None], key[None, :])).to(tl.int64), 0)
    tl.store(reached + key, counts)
    tl.store(reached + BINS + block, tl.sum(counts, 0))


class _Found(NamedTuple):
    """Where the selection ends; 0-dim, pointers inside kernels."""

    last: Tensor
    """The least key that is kept, int32."""
    wanted: Tensor
    """How many are kept on all ranks, int64."""
    more: Tensor
    """How many have larger keys, int64."""


@triton.jit
def _threshold(reached, wanted, found, smallest, BINS: tl.constexpr, BLOCKS: tl.constexpr):
    """The largest key that `wanted` scores reach, or as many as there are; the largest of all keys where there are none."""
    SIZE: tl.constexpr = BINS // BLOCKS
    o = tl.arange(0, BLOCKS)
    sums = tl.load(reached + BINS + o)
    total = tl.sum(sums, 0)
    wanted = tl.minimum(total, wanted)
    after = total - tl.cumsum(sums, 0)
    block = tl.max(tl.where(after + sums >= wanted, o, 0), 0)
    place = tl.arange(0, SIZE)
    counts = tl.load(reached + block * SIZE + place)
    above = tl.sum(tl.where(o == block, after, 0), 0)
    after = above + tl.sum(counts, 0) - tl.cumsum(counts, 0)
    last = tl.max(tl.where(after + counts >= wanted, place, 0), 0)
    tl.store(found.more, tl.sum(tl.where(place == last, after, 0), 0))
    last += block * SIZE
    tl.store(found.last, last)
    tl.store(found.wanted, wanted)
    tl.store(smallest, tl.where(wanted > 0, (last << 16).to(tl.float32, bitcast=True), 0.0))


@triton.jit
def _count(scores, lists, lengths, last, above, tied, n, groups, MEMBERS: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    low = tl.load(last)
    length = tl.load(lengths + row)
    more = 0
    equal = 0
    for first in range(0, length, TILE):
        _, scored, _ = load_listed(scores, lists, row, first + tl.arange(0, TILE), length, groups, n, MEMBERS)
        keys = scored.to(tl.int32)
        more += tl.sum(tl.sum((keys > low).to(tl.int32), 1), 0)
        equal += tl.sum(tl.sum((keys == low).to(tl.int32), 1), 0)
    tl.store(above + row, more)
    tl.store(tied + row, equal)


@triton.jit
def _write(
    scores, lists, lengths, last, quota, offsets, written, n, groups, capacity, MEMBERS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    low = tl.load(last)
    spare = tl.load(quota + row)
    place = tl.load(offsets + row)
    length = tl.load(lengths + row)
    for first in range(0, length, TILE):
        slot = first + tl.arange(0, TILE)
        latent, scored, _ = load_listed(scores, lists, row, slot, length, groups, n, MEMBERS)
        keys = scored.to(tl.int32)
        above, tie = keys > low, keys == low
        # One scan for both: there are fewer than 2^16 of either.
        counts, whole = counts_up_to(above.to(tl.int32) + (tie.to(tl.int32) << 16))
        ties = counts >> 16
        mask = above | (tie & (ties <= spare))
        to = place + (counts & 0xFFFF) + tl.minimum(ties, spare) - 1
        mask = mask & (to < capacity)
        store_pairs(written, to, (keys << 16).to(tl.float32, bitcast=True), latent, row, mask)
        kept_ties = tl.minimum(whole >> 16, spare)
        spare -= kept_ties
        place += (whole & 0xFFFF) + kept_ties


@triton.jit
def _places(
    above, tied, found, ties_before, quota, offsets, l0_sums, overflow, rows, capacity, T: tl.constexpr
):  # fmt: skip
    """How many ties each token keeps, which `quota` holds in place of `above`, and where its pairs end."""
    spare = tl.load(found.wanted) - tl.load(found.more) - tl.load(ties_before)
    ties = tl.zeros((), tl.int64)
    place = tl.zeros((), tl.int32)
    squares = tl.zeros((), tl.float64)
    for start in range(0, rows, T):
        row = start + tl.arange(0, T)
        mask = row < rows
        tie = tl.load(tied + row, mask=mask, other=0)
        wide = tie.to(tl.int64)
        left = tl.maximum(spare - ties - (tl.cumsum(wide, 0) - wide), 0)
        kept_ties = tl.minimum(wide, left).to(tl.int32)
        kept = tl.load(above + row, mask=mask, other=0) + kept_ties
        tl.store(offsets + 1 + row, tl.minimum(place + tl.cumsum(kept, 0), capacity), mask=mask)
        tl.store(quota + row, kept_ties, mask=mask)
        ties += tl.sum(wide, 0)
        place += tl.sum(kept, 0)
        squares += tl.sum(kept.to(tl.float64) * kept.to(tl.float64), 0)
    tl.store(l0_sums, place.to(tl.float64))
    tl.store(l0_sums + 1, squares)
    tl.store(overflow, tl.where(place > capacity, float("nan"), 0.0))


@triton.jit
def _spread(sums, out, tokens, share):
    mean = tl.load(sums) / tokens
    variance = tl.load(sums + 1) / tokens - mean * mean
    tl.store(out, (tl.sqrt(tl.where(variance > 0, variance, 0.0)) * share).to(tl.float32))


class BatchTopKEncoder:
    """The largest B k of ReLU(x W^T + b) over the batch of all ranks, in buffers made once.

    `pairs` holds this rank's of the last call, `smallest` (0-dim float32) the least kept on any rank, 0 where none was.
    Scores are bfloat16; equal ones go to the first tokens, then to the lowest latents. A rank has places for twice its
    mean share; a batch that gave it more would come out as NaN.

    `rows` are this rank's tokens; all ranks have as many.
    """

    def __init__(self, rows: int, num_latents: int, k: int, device: torch.device, ranks: Ranks) -> None:
        self.num_latents = num_latents
        self._rows, self._ranks, world = rows, ranks, ranks.world
        self._wanted = rows * world * k
        self.pairs = ActivePairs.places(rows * k * min(world, 2), num_latents, device, tokens=rows)
        self.smallest = torch.zeros((), device=device)
        self._members = members_of_group(num_latents, k)
        self._groups = triton.cdiv(num_latents, self._members)
        self._scores_BN = torch.empty(rows, num_latents, dtype=torch.bfloat16, device=device)
        self._lists = GroupLists(rows, self._groups, device)
        self._bound = Bound(self._groups, k, rows * k, device, ranks)
        self._above_B = torch.empty(rows, dtype=torch.int32, device=device)
        self._tied_B = torch.empty(rows, dtype=torch.int32, device=device)
        self._places = torch.arange(world, device=device)
        self._bins = torch.zeros(COPIES, BINS, dtype=torch.int32, device=device)
        self._reached = torch.zeros(BINS + BLOCKS, dtype=torch.int64, device=device)
        self._no_ties = torch.zeros((), dtype=torch.int64, device=device)
        self._found = _Found(torch.zeros((), dtype=torch.int32, device=device), *self._no_ties.repeat(2, 1).unbind())
        self._l0_sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._overflow = torch.zeros((), device=device)

    def __call__(self, x_BD: Tensor, w_ND: Tensor, b_N: Tensor) -> None:
        """Encode `x_BD` (bfloat16, already less b_dec)."""
        torch.addmm(b_N, x_BD, w_ND.t(), out=self._scores_BN)
        self.select(self._scores_BN)

    def select(self, scores_BN: Tensor) -> None:
        """The largest of `scores_BN` [B, N], bfloat16."""
        rows, pairs = self._rows, self.pairs
        assert pairs.offsets_B1 is not None
        keys = scores_BN.view(torch.int16)
        lists = self._lists
        maxima_of_groups(keys, lists.marks_BG, self._members)
        bound = self._bound(lists.marks_BG)
        lists.fill(bound)
        tile = max(1, SCORES_A_TILE // self._members)
        listed = (keys, lists.lists_BG, lists.lengths_B)
        sizes = (self.num_latents, self._groups, self._members, tile)

        self._bins.zero_()
        _histogram[(rows,)](*listed, bound, self._bins, *sizes, COPIES, num_warps=2)
        _fold[(BLOCKS,)](self._bins, self._reached, BINS, COPIES, BLOCKS)
        self._ranks.sum(self._reached)
        found = self._found
        _threshold[(1,)](self._reached, self._wanted, found, self.smallest, BINS, BLOCKS)

        _count[(rows,)](*listed, found.last, self._above_B, self._tied_B, *sizes, num_warps=2)
        capacity, quota_B = len(pairs.acts_P), self._above_B
        _places[(1,)](
            self._above_B, self._tied_B, found, self._ties_before(), quota_B, pairs.offsets_B1, self._l0_sums,
            self._overflow, rows, capacity, ROWS_AT_ONCE, num_warps=8,
        )  # fmt: skip
        pairs.sort_keys_P.fill_(self.num_latents - pairs.shift)
        _write[(rows,)](
            *listed, found.last, quota_B, pairs.offsets_B1, pairs.written, *sizes[:2], capacity, *sizes[2:], num_warps=2
        )
        if self._ranks.world > 2:
            pairs.acts_P.add_(self._overflow)

    def _ties_before(self) -> Tensor:
        if self._ranks.world == 1:
            return self._no_ties
        ties = self._ranks.sum(torch.where(self._places == self._ranks.rank, self._tied_B.sum(), 0))
        return torch.where(self._places < self._ranks.rank, ties, 0).sum()

    def spread(self, out: Tensor) -> None:
        """Set `out` to this rank's share of the standard deviation of active latents over the tokens of all ranks."""
        world = self._ranks.world
        _spread[(1,)](self._ranks.sum(self._l0_sums), out, self._rows * world, 1.0 / world)
