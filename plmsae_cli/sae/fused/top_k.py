"""Exact top-k of the encoder's scores, reading them once.

The k groups of neighbouring latents with the largest maxima hold the k largest scores (ties to the lowest group, hence
to the lowest latent), so a pass over all scores only takes maxima, and one program a token then finds the k-th
largest of short lists by bisecting the integers that order bfloat16 from 0 up.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from plmsae_cli.sae.fused.pairs import ActivePairs

TILE_SCORES = 2**28
"""Scores held at once: 512 MiB."""
MAXIMA_A_PROGRAM = 256


@triton.jit
def _choose(keys, k, low):
    """Which k keys are the largest, ties to the front; each one's place among the chosen; the k-th. Not keys below 0.

    At least k keys reach `low`.
    """
    high = tl.max(keys, 0) + 1
    while high - low > 1:
        middle = (low + high) // 2
        count = tl.sum((keys >= middle).to(tl.int32), 0)
        high = tl.where(count > k, high, tl.where(count == k, middle + 1, middle))
        low = tl.where(count >= k, middle, low)
    above = keys > low
    tie = keys == low
    wanted = k - tl.sum(above.to(tl.int32), 0)
    chosen = above | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= wanted))
    return chosen, tl.cumsum(chosen.to(tl.int32), 0) - 1, low


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
    scores, maxima, scratch, written, bases, weights, first, n, groups, k, nothing, PART: tl.constexpr,
    GROUPS: tl.constexpr, MEMBERS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    keys = tl.load(maxima + row * groups + group, mask=group < groups, other=-1).to(tl.int32)
    keys = tl.where(group < groups, tl.maximum(keys, 0), -1)
    # Of K disjoint sets of groups, each has a maximum at least as large as the smallest of those maxima.
    low = tl.maximum(tl.min(tl.max(tl.reshape(keys, (GROUPS // K, K)), 0), 0), 0)
    chosen, place, low = _choose(keys, k, low)
    tl.store(scratch + row * K + place, group, mask=chosen)
    tl.debug_barrier()  # other threads of this program read what was stored
    slot = tl.arange(0, K)
    picked = tl.load(scratch + row * K + slot, mask=slot < k, other=0)
    latent = picked[:, None] * MEMBERS + tl.arange(0, MEMBERS)[None, :]
    valid = (slot < k)[:, None] & (latent < n)
    keys = tl.load(scores + row * n + latent, mask=valid, other=-1).to(tl.int32)
    keys = tl.reshape(tl.where(valid, tl.maximum(keys, 0), -1), (K * MEMBERS,))
    latent = tl.reshape(latent, (K * MEMBERS,))
    chosen, place, low = _choose(keys, k, low)
    out = (first + row) * k + place
    act = (keys << 16).to(tl.float32, bitcast=True)
    if PART:
        latent += tl.load(bases + first + row)
        act = (act * tl.load(weights + first + row)).to(tl.bfloat16).to(tl.float32)
    tl.store(written.acts_P + out, act, mask=chosen)
    tl.store(written.indices_P + out, latent, mask=chosen)
    keys = tl.where(keys > 0, latent, nothing) - written.shift
    tl.store(written.sort_keys_P + out, keys.to(written.sort_keys_P.dtype.element_ty), mask=chosen)


def members_of_group(num_latents: int, k: int) -> int:
    """Latents a group, a power of two: near sqrt(N / k), where both lists are as short; 1 where groups would be few."""
    members = 1 << max(0, round(math.log2(max(1.0, math.sqrt(num_latents / k)))))
    return members if num_latents // members >= k else 1


def maxima_of_groups(keys_BN: Tensor, maxima: Tensor, members: int) -> None:
    """The largest of each group of `members` neighbouring keys (int16: bfloat16's bits), as `maxima` [B or more, groups]."""
    (rows, n), groups = keys_BN.shape, maxima.shape[1]
    tile = min(MAXIMA_A_PROGRAM, triton.next_power_of_2(groups))
    _maxima[(rows, triton.cdiv(groups, tile))](keys_BN, maxima, n, groups, members, tile, num_warps=4)


class TopKEncoder:
    """ReLU(TopK_k(x W^T + b)) for B rows, in buffers made once; `pairs` holds the result of the last call.

    `acts_BK` and `indices_BK` are it, too. The scores are bfloat16; k-th places tie often among them and go to the lowest latent.
    """

    def __init__(self, rows: int, num_latents: int, k: int, device: torch.device, whole: int | None = None) -> None:
        """`whole`: latents of the dictionary, where those scored are some of them, other ones for every token."""
        self.k, self.num_latents, self._whole = k, num_latents, whole or num_latents
        self.members = members_of_group(num_latents, k)
        self.groups = triton.cdiv(num_latents, self.members)
        tiles = triton.cdiv(rows * num_latents, TILE_SCORES)
        self.tile = triton.cdiv(triton.cdiv(rows, tiles), 128) * 128
        self.pairs = ActivePairs.places(rows * k, self._whole, device)
        self.acts_BK = self.pairs.acts_P.view(rows, k)
        self.indices_BK = self.pairs.indices_P.view(rows, k)
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

    def select(
        self, scores_TN: Tensor, first: int, bases_B: Tensor | None = None, weights_B: Tensor | None = None
    ) -> None:
        """The top k of each row, as rows `first`... of the result.

        `bases_B` (int32): the latent that is a token's first; `weights_B`: what its activations are multiplied by.
        """
        rows, keys = len(scores_TN), scores_TN.view(torch.int16)
        maxima_of_groups(keys, self._maxima, self.members)
        GROUPS = max(triton.next_power_of_2(self.groups), self._K)
        _select[(rows,)](
            keys,
            self._maxima,
            self._scratch,
            self.pairs.written,
            bases_B,
            weights_B,
            first,
            self.num_latents,
            self.groups,
            self.k,
            self._whole,
            bases_B is not None,
            GROUPS,
            self.members,
            self._K,
            num_warps=max(1, min(8, max(GROUPS, self._K * self.members) // 1024)),
        )
