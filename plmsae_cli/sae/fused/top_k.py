"""Exact top-k of the encoder's scores, reading them once.

The k groups of neighbouring latents with the largest maxima hold the k largest scores (ties to the lowest group, hence
to the lowest latent), so a pass over all scores only takes maxima, and one program a token then finds the k-th
largest of short lists by bisecting the 15 bits that order positive bfloat16.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_SCORES = 2**27
"""Scores held at once: 256 MiB."""
MAXIMA_A_PROGRAM = 256


@triton.jit
def _kth_largest(keys, k, BITS: tl.constexpr):
    """The largest t >= 0 that at least k keys reach."""
    t = 0
    for i in tl.static_range(BITS):
        trial = t | (1 << (BITS - 1 - i))
        t = tl.where(tl.sum((keys >= trial).to(tl.int32), 0) >= k, trial, t)
    return t


@triton.jit
def _choose(keys, k):
    """Which k keys are the largest, ties to the front, and each one's place among the chosen. Keys below 0 never are."""
    t = _kth_largest(keys, k, 15)
    above = keys > t
    tie = keys == t
    wanted = k - tl.sum(above.to(tl.int32), 0)
    chosen = above | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= wanted))
    return chosen, tl.cumsum(chosen.to(tl.int32), 0) - 1


@triton.jit
def _maxima(scores, maxima, n, groups, MEMBERS: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * TILE + tl.arange(0, TILE)
    latent = group[:, None] * MEMBERS + tl.arange(0, MEMBERS)[None, :]
    # The bits of a bfloat16, as an integer, order as it does from 0 up; below 0 they are negative.
    keys = tl.load(scores + row * n + latent, mask=latent < n, other=-1)
    tl.store(maxima + row * groups + group, tl.max(keys, 1), mask=group < groups)


@triton.jit
def _select(
    scores,
    maxima,
    scratch,
    acts,
    indices,
    first,
    n,
    groups,
    k,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    keys = tl.load(maxima + row * groups + group, mask=group < groups, other=-1).to(tl.int32)
    chosen, place = _choose(tl.where(group < groups, tl.maximum(keys, 0), -1), k)
    tl.store(scratch + row * K + place, group, mask=chosen)
    tl.debug_barrier()  # other threads of this program read what was stored
    slot = tl.arange(0, K)
    picked = tl.load(scratch + row * K + slot, mask=slot < k, other=0)
    latent = picked[:, None] * MEMBERS + tl.arange(0, MEMBERS)[None, :]
    valid = (slot < k)[:, None] & (latent < n)
    keys = tl.load(scores + row * n + latent, mask=valid, other=-1).to(tl.int32)
    keys = tl.reshape(tl.where(valid, tl.maximum(keys, 0), -1), (K * MEMBERS,))
    latent = tl.reshape(latent, (K * MEMBERS,))
    chosen, place = _choose(keys, k)
    out = (first + row) * k + place
    tl.store(acts + out, (keys << 16).to(tl.float32, bitcast=True), mask=chosen)
    tl.store(indices + out, latent, mask=chosen)


def members_of_group(num_latents: int, k: int) -> int:
    """Latents a group, a power of two: near sqrt(N / k), where both lists are as short; 1 where groups would be few."""
    members = 1 << max(0, round(math.log2(max(1.0, math.sqrt(num_latents / k)))))
    return members if num_latents // members >= k else 1


class TopKEncoder:
    """ReLU(TopK_k(x W^T + b)) for B rows, in buffers made once.

    acts_BK (float32) and indices_BK (int32) hold the result of the last call, by ascending latent within a row. The
    scores are bfloat16; k-th places tie often among them and go to the lowest latent.
    """

    def __init__(self, rows: int, num_latents: int, k: int, device: torch.device) -> None:
        self.k, self.num_latents = k, num_latents
        self.members = members_of_group(num_latents, k)
        self.groups = triton.cdiv(num_latents, self.members)
        self.tile = min(rows, max(128, TILE_SCORES // num_latents))
        self.acts_BK = torch.empty(rows, k, device=device)
        self.indices_BK = torch.empty(rows, k, dtype=torch.int32, device=device)
        self._scores_TN = torch.empty(self.tile, num_latents, dtype=torch.bfloat16, device=device)
        self._maxima = torch.empty(self.tile, self.groups, dtype=torch.int16, device=device)
        self._K = triton.next_power_of_2(k)
        self._scratch = torch.empty(self.tile, self._K, dtype=torch.int32, device=device)

    def __call__(self, x_BD: Tensor, w_ND: Tensor, b_N: Tensor) -> None:
        """Encode `x_BD` (bfloat16, already less b_dec)."""
        for first in range(0, len(x_BD), self.tile):
            rows = min(self.tile, len(x_BD) - first)
            scores_TN = self._scores_TN[:rows]
            torch.addmm(b_N, x_BD[first : first + rows], w_ND.t(), out=scores_TN)
            self.select(scores_TN, first)

    def select(self, scores_TN: Tensor, first: int) -> None:
        """The top k of each row, as rows `first`... of the result."""
        rows, keys = len(scores_TN), scores_TN.view(torch.int16)
        tile = min(MAXIMA_A_PROGRAM, triton.next_power_of_2(self.groups))
        _maxima[(rows, triton.cdiv(self.groups, tile))](
            keys, self._maxima, self.num_latents, self.groups, self.members, tile, num_warps=4
        )
        GROUPS = triton.next_power_of_2(self.groups)
        _select[(rows,)](
            keys,
            self._maxima,
            self._scratch,
            self.acts_BK,
            self.indices_BK,
            first,
            self.num_latents,
            self.groups,
            self.k,
            GROUPS,
            self.members,
            self._K,
            num_warps=max(1, min(8, max(GROUPS, self._K * self.members) // 1024)),
        )
