"""The B k largest scores of a batch, exactly: what `batch_selection.keep_largest` keeps, in four short kernels.

All scores are read once, for the maxima of groups of neighbouring latents. Where B k of those maxima reach a value, so do
B k scores; as well where B k maxima of some groups each do. The B k-th largest of these bounds the threshold from below, and
from then on only groups that reach the bound are read. A histogram of what reaches it (32,768 bins, one for each positive
bfloat16) gives the threshold and how many equal to it are kept; integer sums, so any order of the additions gives the same.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plmsae_cli.sae.fused.listed import GroupLists, load_listed, store_pairs
from plmsae_cli.sae.fused.pairs import ActivePairs
from plmsae_cli.sae.fused.top_k import maxima_of_groups, members_of_group
from plmsae_cli.sae.ranks import Ranks

BINS_APART = 8
"""Numbers from one bin to the next, so that additions to neighbours do not queue for the same sector."""
DIGIT_BITS = 5
DIGITS = 3
BINS = 1 << DIGITS * DIGIT_BITS
"""Positive values of bfloat16, zero included."""
COUNTERS = 1024
KEYS_A_PROGRAM = 1024
SCORES_A_TILE = 1024


@triton.jit
def _bound(partial, wanted, found, counters, SHIFT: tl.constexpr, VALUES: tl.constexpr, COUNTERS: tl.constexpr):
    """`found` with one more digit: the largest value that `wanted` keys reach."""
    o = tl.arange(0, COUNTERS)
    digit = tl.arange(0, VALUES)
    counts = tl.sum(tl.load(partial + o[:, None] * VALUES + digit[None, :], mask=o[:, None] < counters, other=0), 0)
    best = tl.max(tl.where((counts >= wanted) | (digit == 0), digit, 0), 0)
    tl.store(found, tl.load(found) | (best << SHIFT))


@triton.jit
def _count_digit(
    keys, found, partial, size, SHIFT: tl.constexpr, VALUES: tl.constexpr, FOLD: tl.constexpr, TILE: tl.constexpr
):
    """How many of the maxima of FOLD neighbouring keys reach each value of the next digit; this program's share."""
    digit = tl.arange(0, VALUES)
    trial = tl.load(found) | (digit << SHIFT)
    counts = tl.zeros((VALUES,), tl.int32)
    for start in range(tl.program_id(0) * TILE, tl.cdiv(size, FOLD), tl.num_programs(0) * TILE):
        o = (start + tl.arange(0, TILE))[:, None] * FOLD + tl.arange(0, FOLD)[None, :]
        key = tl.max(tl.load(keys + o, mask=o < size, other=-1), 1).to(tl.int32)
        counts += tl.sum((key[:, None] >= trial[None, :]).to(tl.int32), 0)
    tl.store(partial + tl.program_id(0) * VALUES + digit, counts)


@triton.jit
def _histogram(
    scores, lists, lengths, bound, bins, n, groups, MEMBERS: tl.constexpr, TILE: tl.constexpr, APART: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    low = tl.maximum(tl.load(bound), 1)
    length = tl.load(lengths + row)
    for first in range(0, length, TILE):
        _, scored, _ = load_listed(scores, lists, row, first + tl.arange(0, TILE), length, groups, n, MEMBERS)
        keys = scored.to(tl.int32)
        tl.atomic_add(bins + keys * APART, 1, mask=keys >= low, sem="relaxed")


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
        latent = tl.reshape(latent, (TILE * MEMBERS,))
        keys = tl.reshape(scored, (TILE * MEMBERS,)).to(tl.int32)
        tie = (keys == low).to(tl.int32)
        kept = ((keys > low) | ((tie == 1) & (tl.cumsum(tie, 0) <= spare))).to(tl.int32)
        to = place + tl.cumsum(kept, 0) - 1
        mask = (kept == 1) & (to < capacity)
        store_pairs(written, to, (keys << 16).to(tl.float32, bitcast=True), latent, row, mask)
        spare -= tl.sum(tie, 0)
        place += tl.sum(kept, 0)


def fold_of(groups: int, k: int) -> int:
    """Groups of which the bound takes one maximum: the fewer it counts the sooner it is found, but the lower it lies."""
    return next((fold for fold in (4, 2) if groups >= 4 * k * fold), 1)


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
        self._wanted_here, self._wanted = rows * k, rows * world * k
        self.pairs = ActivePairs.places(rows * k * min(world, 2), num_latents, device, tokens=rows)
        self.smallest = torch.zeros((), device=device)
        self._members = members_of_group(num_latents, k)
        self._groups = triton.cdiv(num_latents, self._members)
        self._scores_BN = torch.empty(rows, num_latents, dtype=torch.bfloat16, device=device)
        self._lists = GroupLists(rows, self._groups, device)
        self._fold = fold_of(self._groups, k)
        self._partial = torch.empty(COUNTERS, 1 << DIGIT_BITS, dtype=torch.int32, device=device)
        self._above_B = torch.empty(rows, dtype=torch.int32, device=device)
        self._tied_B = torch.empty(rows, dtype=torch.int32, device=device)
        self._places = torch.arange(world, device=device)

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
        bound = self._bound()
        lists.fill(bound)
        tile = max(1, SCORES_A_TILE // self._members)
        listed = (keys, lists.lists_BG, lists.lengths_B)
        sizes = (self.num_latents, self._groups, self._members, tile)

        bins = torch.zeros(BINS, BINS_APART, dtype=torch.int32, device=keys.device)
        _histogram[(rows,)](*listed, bound, bins, *sizes, BINS_APART, num_warps=2)
        reached = self._ranks.sum(bins[:, 0].long()).flip(0).cumsum(0).flip(0)
        wanted = reached[1].clamp(max=self._wanted)
        last = (reached[1:] >= wanted).sum(dtype=torch.int32)
        more = torch.cat([reached, reached.new_zeros(1)]).index_select(0, last.view(1) + 1).squeeze(0)
        self.smallest.copy_(torch.where(wanted > 0, (last << 16).view(torch.float32), 0.0))

        _count[(rows,)](*listed, last, self._above_B, self._tied_B, *sizes, num_warps=2)
        tied_B = self._tied_B.long()
        quota_B = (wanted - more - self._ties_before(tied_B) - (tied_B.cumsum(0) - tied_B)).clamp(min=0)
        ends_B = (self._above_B + torch.minimum(tied_B, quota_B)).cumsum(0)
        capacity = len(pairs.acts_P)
        pairs.offsets_B1[1:].copy_(ends_B.clamp(max=capacity))
        pairs.sort_keys_P.fill_(self.num_latents - pairs.shift)
        _write[(rows,)](
            *listed, last, quota_B, pairs.offsets_B1, pairs.written, *sizes[:2], capacity, *sizes[2:], num_warps=2
        )
        if self._ranks.world > 2:
            pairs.acts_P.add_(torch.where(ends_B[-1] > capacity, torch.nan, 0.0))

    def _bound(self) -> Tensor:
        """A value that enough scores of all ranks reach, or 0: int32, 0-dim."""
        found = torch.zeros((), dtype=torch.int32, device=self._partial.device)
        keys = self._lists.marks_BG.view(-1)
        programs = min(COUNTERS, triton.cdiv(len(keys), KEYS_A_PROGRAM * self._fold))
        for digit in reversed(range(DIGITS)):
            shift = digit * DIGIT_BITS
            _count_digit[(programs,)](
                keys, found, self._partial, len(keys), shift, 1 << DIGIT_BITS, self._fold, KEYS_A_PROGRAM, num_warps=4
            )
            _bound[(1,)](
                self._partial, self._wanted_here, found, programs, shift, 1 << DIGIT_BITS, COUNTERS, num_warps=4
            )
        if self._ranks.world > 1:
            # On every rank as many scores as its mean share reach its bound, so all of them reach the least bound.
            found = self._ranks.maximum(-found).neg_()
        return found

    def _ties_before(self, tied_B: Tensor) -> Tensor | int:
        if self._ranks.world == 1:
            return 0
        ties = self._ranks.sum(torch.where(self._places == self._ranks.rank, tied_B.sum(), 0))
        return torch.where(self._places < self._ranks.rank, ties, 0).sum()

    def spread(self) -> Tensor:
        """Standard deviation of the number of active latents over the tokens of all ranks."""
        assert self.pairs.offsets_B1 is not None
        active_B = self.pairs.offsets_B1.diff().double()
        sums = self._ranks.sum(torch.stack([active_B.sum(), active_B.square().sum()]))
        mean, square = (sums / (self._rows * self._ranks.world)).unbind()
        return (square - mean.square()).clamp(min=0.0).sqrt()
