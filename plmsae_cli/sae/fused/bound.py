"""A value that B k scores of a batch reach, from the maxima of their groups: where maxima reach it, so do scores."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plmsae_cli.sae.ranks import Ranks

DIGIT_BITS = 5
DIGITS = 3
COUNTERS = 1024
KEYS_A_PROGRAM = 1024


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


def fold_of(groups: int, k: int) -> int:
    """Groups of which the bound takes one maximum: the fewer it counts the sooner it is found, but the lower it lies."""
    return next((fold for fold in (4, 2) if groups >= 4 * k * fold), 1)


class Bound:
    """The largest value that `wanted` maxima reach, of all groups or of so many together; in buffers made once."""

    def __init__(self, groups: int, k: int, wanted: int, device: torch.device, ranks: Ranks) -> None:
        """`wanted`: of this rank's scores, B k."""
        self._wanted, self._ranks, self._fold = wanted, ranks, fold_of(groups, k)
        self._partial = torch.empty(COUNTERS, 1 << DIGIT_BITS, dtype=torch.int32, device=device)

    def __call__(self, maxima_BG: Tensor) -> Tensor:
        """A value that enough scores of all ranks reach, or 0: int32, 0-dim. `maxima_BG`: int16, bfloat16's bits."""
        found = torch.zeros((), dtype=torch.int32, device=maxima_BG.device)
        keys, values = maxima_BG.view(-1), 1 << DIGIT_BITS
        programs = min(COUNTERS, triton.cdiv(len(keys), KEYS_A_PROGRAM * self._fold))
        for digit in reversed(range(DIGITS)):
            shift = digit * DIGIT_BITS
            _count_digit[(programs,)](
                keys, found, self._partial, len(keys), shift, values, self._fold, KEYS_A_PROGRAM, num_warps=4
            )
            _bound[(1,)](self._partial, self._wanted, found, programs, shift, values, COUNTERS, num_warps=4)
        if self._ranks.world > 1:
            # On every rank as many scores as its mean share reach its bound, so all of them reach the least bound.
            found = self._ranks.maximum(-found).neg_()
        return found
