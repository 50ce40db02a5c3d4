"""The pairs of a JumpReLU: those above their latent's threshold, and those whose gradient the threshold gets.

Scores are read once, to count a token's pairs in each group of neighbouring latents; from then on only groups that hold
some are read, and their pairs written where the counts say. Where a batch has more pairs than
places, as early in training, none are listed and `dense` is set: `fused.dense` then computes from the scores themselves.
The device decides; nobody waits for its count.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plmsae_cli.sae.fused.listed import GroupLists, counts_up_to, load_listed, store_pairs
from plmsae_cli.sae.fused.pairs import ActivePairs
from plmsae_cli.sae.fused.top_k import members_of_group

ROWS, SCORES = 4, 512
"""Tokens of a program, and scores of each that it counts at once."""
TYPICAL = 64
"""Pairs of a token that the size of the groups is chosen for."""
SCORES_A_TILE = 1024
"""Scores of listed groups that are read at once."""
NEAR_TILE = 256
"""Pairs of a latent that are read at once: some latents are active in most tokens."""


@triton.jit
def above_and_near(scores, theta, row, latent, rows, n, half):
    """Scores, which of them are above their threshold, and which are nearer to it than `half`."""
    inside = (row < rows)[:, None] & (latent < n)[None, :]
    places = scores + row.to(tl.int64)[:, None] * n + latent[None, :]
    score = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    limit = tl.load(theta + latent, mask=latent < n, other=0.0)[None, :]
    above, near = beside(score, limit, inside, half)
    return score, above, near


@triton.jit
def beside(score, limit, inside, half):
    """Which scores are above their threshold, and which are nearer to it than `half`."""
    return inside & (score > limit), inside & (tl.abs(score - limit) < half)


@triton.jit
def _count_listed(
    scores,
    theta,
    listed,
    active,
    marks,
    rows,
    n,
    groups,
    half,
    MEMBERS: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    all_listed = tl.zeros((R, T // MEMBERS), tl.int32)
    all_active = tl.zeros((R, T), tl.int32)
    for first in range(0, n, T):
        _, above, near = above_and_near(scores, theta, row, first + tl.arange(0, T), rows, n, half)
        counts = tl.sum(tl.reshape((above | near).to(tl.int32), (R, T // MEMBERS, MEMBERS)), 2)
        group = first // MEMBERS + tl.arange(0, T // MEMBERS)
        to = marks + row.to(tl.int64)[:, None] * groups + group[None, :]
        tl.store(to, counts.to(tl.int16), mask=(row < rows)[:, None] & (group < groups)[None, :])
        all_listed += counts
        all_active += above.to(tl.int32)
    tl.store(listed + row, tl.sum(all_listed, 1), mask=row < rows)
    tl.store(active + row, tl.sum(all_active, 1), mask=row < rows)


@triton.jit
def _write_listed(
    scores, theta, lists, lengths, offsets, dense, written, n, groups, half, MEMBERS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    if tl.load(dense) == 0:
        row = tl.program_id(0).to(tl.int64)
        place = tl.load(offsets + row)
        length = tl.load(lengths + row)
        for first in range(0, length, TILE):
            slot = first + tl.arange(0, TILE)
            latent, scored, wanted = load_listed(scores, lists, row, slot, length, groups, n, MEMBERS)
            score = scored.to(tl.float32)
            above, near = beside(score, tl.load(theta + latent, mask=wanted, other=0.0), wanted, half)
            listed = above | near
            counts, whole = counts_up_to(listed.to(tl.int32))
            store_pairs(written, place + counts - 1, tl.where(above, score, 0.0), latent, row, listed)
            place += whole


@triton.jit
def _near_sums(offsets, order, token, slope, scores, theta, sums, n, half, T: tl.constexpr):
    """Of a latent's pairs near its threshold: the sum of <residual, decoder row>, and how many there are."""
    latent = tl.program_id(0)
    begin = tl.load(offsets + latent)
    end = tl.load(offsets + latent + 1)
    limit = tl.load(theta + latent)
    total = tl.zeros((T,), tl.float32)
    count = tl.zeros((T,), tl.float32)
    for start in range(begin, end, T):
        p = start + tl.arange(0, T)
        mask = p < end
        row = tl.load(token + p, mask=mask, other=0).to(tl.int64)
        score = tl.load(scores + row * n + latent, mask=mask, other=0.0).to(tl.float32)
        near = mask & (tl.abs(score - limit) < half)
        source = tl.load(order + p, mask=mask, other=0)
        total += tl.load(slope + source, mask=near, other=0.0)
        count += near.to(tl.float32)
    tl.store(sums + latent, tl.sum(total, 0))
    tl.store(sums + n + latent, tl.sum(count, 0))


class ThresholdEncoder:
    """z = a H(a - theta) of a = x W^T + b, in buffers made once; `pairs` are the active ones and those near theta.

    A pair near theta, |a - theta| < bandwidth / 2, but not above it is listed with activation 0. `dense` (int32, 0-dim)
    is 1 where there are more than `capacity` pairs: then none are listed, and `scores_BN` holds the activations' source.
    `active_B`: how many latents of each token are active.
    """

    def __init__(self, rows: int, num_latents: int, bandwidth: float, log_theta_N: Tensor, capacity: int) -> None:
        device = log_theta_N.device
        self.half, self._log_theta_N = bandwidth / 2, log_theta_N
        self.theta_N = torch.empty_like(log_theta_N)
        self.pairs = ActivePairs.places(capacity, num_latents, device, tokens=rows)
        self.scores_BN = torch.empty(rows, num_latents, dtype=torch.bfloat16, device=device)
        self._members = members_of_group(num_latents, TYPICAL)
        self._lists = GroupLists(rows, triton.cdiv(num_latents, self._members), device)
        self.active_B, self._listed_B = torch.zeros(2, rows, dtype=torch.int32, device=device)
        self.dense = torch.zeros((), dtype=torch.int32, device=device)
        self.near_2N = torch.zeros(2, num_latents, device=device)
        """Of pairs near theta by latent, after `sum_near`: sum of <residual, decoder row>, and number."""

    def __call__(self, x_BD: Tensor, w_ND: Tensor, b_N: Tensor) -> None:
        """Encode `x_BD` (bfloat16, already less b_dec)."""
        torch.addmm(b_N, x_BD, w_ND.t(), out=self.scores_BN)
        self.select()

    def select(self) -> None:
        """List the pairs of `scores_BN`."""
        pairs, (rows, n) = self.pairs, self.scores_BN.shape
        assert pairs.offsets_B1 is not None
        torch.exp(self._log_theta_N, out=self.theta_N)
        lists, members, source = self._lists, self._members, (self.scores_BN, self.theta_N)
        groups = lists.marks_BG.shape[1]
        counts = (self._listed_B, self.active_B, lists.marks_BG)
        tile = max(members, min(SCORES, triton.next_power_of_2(n)))
        _count_listed[(triton.cdiv(rows, ROWS),)](
            *source, *counts, rows, n, groups, self.half, members, ROWS, tile, num_warps=4
        )
        lists.fill()
        ends_B = self._listed_B.cumsum(0)
        self.dense.copy_(ends_B[-1] > len(pairs.acts_P))
        pairs.offsets_B1[1:].copy_(ends_B * (1 - self.dense))
        pairs.sort_keys_P.fill_(n - pairs.shift)
        _write_listed[(rows,)](
            *source, lists.lists_BG, lists.lengths_B, pairs.offsets_B1, self.dense, pairs.written, n, groups, self.half,
            members, max(1, SCORES_A_TILE // members), num_warps=2,
        )  # fmt: skip

    def sum_near(self, offsets_N1: Tensor, order_P: Tensor, token_P: Tensor, slope_P: Tensor) -> None:
        """Set `near_2N`, of the pairs in order of latent; `slope_P` in order of token."""
        n = len(self.theta_N)
        pairs = (offsets_N1, order_P, token_P, slope_P)
        _near_sums[(n,)](*pairs, self.scores_BN, self.theta_N, self.near_2N, n, self.half, NEAR_TILE, num_warps=2)
