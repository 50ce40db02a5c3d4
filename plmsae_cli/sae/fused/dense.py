"""A step in which too many latents are active to list them: products over all of them, from the scores.

Every kernel ends at once unless `dense` is set on the device. z = a H(a - theta) is made of the scores in passing.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plmsae_cli.sae.fused.gradients import WeightGradients
from plmsae_cli.sae.fused.threshold import ThresholdEncoder, above_and_near

TILE, WIDE, STEP = 128, 256, 64
"""Rows and latents of a program's part of a product, its columns of d, and the length of its steps."""
TOGETHER = 8
"""Blocks of tokens whose programs run side by side, so that they read the same decoder rows from the cache."""
PROGRAMS = 1056
"""Few enough to end at once; each does its part of many tiles where there is work."""
SUMS = 5
"""Over tokens, of each latent: slope, slope z, slope near theta, number near theta, number active."""
LATENTS = 16


@triton.jit
def _decode_all(
    dense, scores, theta, w, x, residual, energy, rows, n, d: tl.constexpr, M: tl.constexpr, D: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    if tl.load(dense) > 0:
        row = tl.program_id(1) * M + tl.arange(0, M)
        o = tl.program_id(0) * D + tl.arange(0, D)
        here = row < rows
        of_row = row.to(tl.int64)[:, None]
        total = tl.zeros((M, D), tl.float32)
        for first in range(0, n, L):
            latent = first + tl.arange(0, L)
            known = latent < n
            score = tl.load(scores + of_row * n + latent[None, :], mask=here[:, None] & known[None, :], other=0.0)
            limit = tl.load(theta + latent, mask=known, other=float("inf"))
            z = tl.where(score.to(tl.float32) > limit[None, :], score, tl.zeros_like(score))
            places = w + latent.to(tl.int64)[:, None] * d + o[None, :]
            total = tl.dot(z, tl.load(places, mask=known[:, None] & (o < d)[None, :], other=0.0), total)
        both = here[:, None] & (o < d)[None, :]
        at = of_row * d + o[None, :]
        error = tl.load(x + at, mask=both, other=0.0).to(tl.float32) - total
        error = tl.where(both, error, 0.0)
        tl.store(residual + at, error.to(tl.bfloat16), mask=both)
        tl.store(energy + tl.program_id(0) * rows + row, tl.sum(error * error, 1), mask=here)


@triton.jit
def _slopes_of_all(
    dense,
    residual,
    w,
    scores,
    theta,
    slopes,
    sums,
    rows,
    n,
    half,
    d: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """Slopes of active pairs, z in place of the scores, and each block's share of the sums over tokens."""
    if tl.load(dense) > 0:
        columns = tl.cdiv(n, N)
        blocks = tl.cdiv(rows, M)
        for part in range(tl.program_id(0), tl.cdiv(blocks, G) * G * columns, tl.num_programs(0)):
            inside = part % (G * columns)
            block = part // (G * columns) * G + inside % G
            latent = (inside // G) * N + tl.arange(0, N)
            row = block * M + tl.arange(0, M)
            here = row < rows
            known = latent < n
            of_row = row.to(tl.int64)[:, None]
            total = tl.zeros((M, N), tl.float32)
            for start in range(0, d, D):
                o = start + tl.arange(0, D)
                left = tl.load(residual + of_row * d + o[None, :], mask=here[:, None] & (o < d)[None, :], other=0.0)
                places = w + latent.to(tl.int64)[None, :] * d + o[:, None]
                total = tl.dot(left, tl.load(places, mask=known[None, :] & (o < d)[:, None], other=0.0), total)
            score, above, near = above_and_near(scores, theta, row, latent, rows, n, half)
            slope = tl.where(above, total, 0.0)
            z = tl.where(above, score, 0.0)
            both = here[:, None] & known[None, :]
            at = of_row * n + latent[None, :]
            tl.store(slopes + at, slope.to(tl.bfloat16), mask=both)
            tl.store(scores + at, z.to(tl.bfloat16), mask=both)
            to = sums + tl.cast(block, tl.int64) * (5 * n) + latent
            counted = known & (block < blocks)
            tl.store(to, tl.sum(slope, 0), mask=counted)
            tl.store(to + n, tl.sum(slope * z, 0), mask=counted)
            tl.store(to + 2 * n, tl.sum(tl.where(near, total, 0.0), 0), mask=counted)
            tl.store(to + 3 * n, tl.sum(near.to(tl.float32), 0), mask=counted)
            tl.store(to + 4 * n, tl.sum(above.to(tl.float32), 0), mask=counted)


@triton.jit
def _weights_of_all(
    dense, of_pairs, of_tokens, out, rows, n, factor, d: tl.constexpr, N: tl.constexpr, D: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """out[i] = factor * sum over tokens: of_pairs[b, i] of_tokens[b]."""
    if tl.load(dense) > 0:
        across = tl.cdiv(d, D)
        for part in range(tl.program_id(0), tl.cdiv(n, N) * across, tl.num_programs(0)):
            latent = (part // across) * N + tl.arange(0, N)
            o = (part % across) * D + tl.arange(0, D)
            known = latent < n
            total = tl.zeros((N, D), tl.float32)
            for first in range(0, rows, T):
                row = first + tl.arange(0, T)
                of_row = row.to(tl.int64)[:, None]
                here = (row < rows)[:, None]
                left = tl.load(of_pairs + of_row * n + latent[None, :], mask=here & known[None, :], other=0.0)
                right = tl.load(of_tokens + of_row * d + o[None, :], mask=here & (o < d)[None, :], other=0.0)
                total = tl.dot(tl.trans(left), right, total)
            to = out + latent.to(tl.int64)[:, None] * d + o[None, :]
            tl.store(to, (total * factor).to(tl.bfloat16), mask=known[:, None] & (o < d)[None, :])


@triton.jit
def _latent_sums(
    dense, sums, out, near, blocks, n, factor, d: tl.constexpr, S: tl.constexpr, L: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    if tl.load(dense) > 0:
        latent = tl.program_id(0) * L + tl.arange(0, L)
        known = latent < n
        bias = tl.zeros((L,), tl.float32)
        parallel = tl.zeros((L,), tl.float32)
        near_slope = tl.zeros((L,), tl.float32)
        near_count = tl.zeros((L,), tl.float32)
        fired = tl.zeros((L,), tl.float32)
        for block in range(blocks):
            part = sums + tl.cast(block, tl.int64) * (5 * n) + latent
            bias += tl.load(part, mask=known, other=0.0)
            parallel += tl.load(part + n, mask=known, other=0.0)
            near_slope += tl.load(part + 2 * n, mask=known, other=0.0)
            near_count += tl.load(part + 3 * n, mask=known, other=0.0)
            fired += tl.load(part + 4 * n, mask=known, other=0.0)
        tl.store(out.grad_b_N + latent, bias * factor, mask=known)
        tl.store(out.along_N + latent, parallel * factor, mask=known)
        tl.store(near + latent, near_slope, mask=known)
        tl.store(near + n + latent, near_count, mask=known)
        tl.store(out.counts_N + latent, fired.to(tl.int32), mask=known)
        tl.store(out.touched_N + latent, tl.full((L,), 1, tl.int32), mask=known)
        squares = tl.zeros((L, D), tl.float32)
        for start in range(0, d, D):
            o = start + tl.arange(0, D)
            both = known[:, None] & (o < d)[None, :]
            at = latent.to(tl.int64)[:, None] * d + o[None, :]
            dec = tl.load(out.grad_dec_ND + at, mask=both, other=0.0).to(tl.float32)
            enc = tl.load(out.grad_enc_ND + at, mask=both, other=0.0).to(tl.float32)
            squares += dec * dec + enc * enc
        tl.store(out.square_SN + latent, tl.sum(squares, 1), mask=known)
        for part in tl.static_range(1, S):
            tl.store(out.square_SN + part * n + latent, tl.zeros((L,), tl.float32), mask=known)


class DenseStep:
    """What the pairs would give, of all scores; in buffers made once."""

    def __init__(self, rows: int, num_latents: int, d: int, device: torch.device) -> None:
        self._blocks = triton.cdiv(rows, TILE)
        self._slopes_BN = torch.empty(rows, num_latents, dtype=torch.bfloat16, device=device)
        self._sums = torch.empty(self._blocks, SUMS, num_latents, device=device)
        self._energy = torch.zeros(triton.cdiv(d, WIDE), rows, device=device)

    def decode(
        self, encode: ThresholdEncoder, x_BD: Tensor, w_dec_ND: Tensor, residual_BGD: Tensor, energy_2B: Tensor
    ) -> None:
        """Residuals and their squares, as `residual.residuals`."""
        (rows, d), n = x_BD.shape, len(w_dec_ND)
        _decode_all[(triton.cdiv(d, WIDE), self._blocks)](
            encode.dense, encode.scores_BN, encode.theta_N, w_dec_ND, x_BD, residual_BGD, self._energy, rows, n, d,
            TILE, WIDE, STEP, num_warps=8, num_stages=3,
        )  # fmt: skip
        energy_2B.copy_(torch.where(encode.dense > 0, self._energy.sum(0), energy_2B))

    def gradients(
        self,
        encode: ThresholdEncoder,
        x_BD: Tensor,
        w_dec_ND: Tensor,
        residual_BGD: Tensor,
        factor: float,
        out: WeightGradients,
    ) -> None:
        """All that `WeightGradients.sum` and `ThresholdEncoder.sum_near` set; the scores become z."""
        (rows, d), n = x_BD.shape, len(w_dec_ND)
        parts = triton.cdiv(self._blocks, TOGETHER) * TOGETHER * triton.cdiv(n, TILE)
        _slopes_of_all[(min(PROGRAMS, parts),)](
            encode.dense, residual_BGD, w_dec_ND, encode.scores_BN, encode.theta_N, self._slopes_BN, self._sums,
            rows, n, encode.half, d, TOGETHER, TILE, TILE, STEP, num_warps=8, num_stages=3,
        )  # fmt: skip
        for of_pairs, of_tokens, matrix in (
            (encode.scores_BN, residual_BGD, out.grad_dec_ND),
            (self._slopes_BN, x_BD, out.grad_enc_ND),
        ):
            _weights_of_all[(min(PROGRAMS, triton.cdiv(d, WIDE) * triton.cdiv(n, TILE)),)](
                encode.dense, of_pairs, of_tokens, matrix, rows, n, factor, d, TILE, WIDE, STEP,
                num_warps=8, num_stages=3,
            )  # fmt: skip
        _latent_sums[(triton.cdiv(n, LATENTS),)](
            encode.dense, self._sums, out.of_latents, encode.near_2N, self._blocks, n, factor, d, len(out.square_SN),
            LATENTS, 128, num_warps=4,
        )  # fmt: skip
