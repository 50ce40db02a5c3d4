"""A step in which too many latents are active to list them: products over all of them, from the scores.

Every kernel ends at once unless `dense` is set on the device. z = a H(a - theta) is made of the scores in passing.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from plmsae_cli.sae.fused.gradients import WeightGradients
from plmsae_cli.sae.fused.threshold import ThresholdEncoder, beside

TILE, WIDE, STEP = 128, 256, 64
"""Rows and latents of a program's part of a product, its columns of d, and the length of its steps."""
TOGETHER = 8
"""Blocks of tokens whose programs run side by side, so that they read the same decoder rows from the cache."""
SUMS = 2
"""Over tokens, of each latent: slope, slope near theta."""
LATENTS = 16
SHARED_BYTES = 190_000
"""Of shared memory, which the largest tiles take where they are read by descriptors."""


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def _tile(matrix, row, column, rows, columns, R: tl.constexpr, C: tl.constexpr, DESCRIBED: tl.constexpr):
    """A tile of a matrix [rows, columns], by its descriptor or by its pointer; zeros beyond the edges."""
    if DESCRIBED:
        tile = matrix.load([row, column])
    else:
        i = row + tl.arange(0, R)
        j = column + tl.arange(0, C)
        at = i.to(tl.int64)[:, None] * columns + j[None, :]
        tile = tl.load(matrix + at, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)
    return tile


@triton.jit
def _store_tile(matrix, row, column, rows, columns, tile, R: tl.constexpr, C: tl.constexpr, DESCRIBED: tl.constexpr):
    if DESCRIBED:
        matrix.store([row, column], tile.to(tl.bfloat16))
    else:
        i = row + tl.arange(0, R)
        j = column + tl.arange(0, C)
        at = i.to(tl.int64)[:, None] * columns + j[None, :]
        tl.store(matrix + at, tile.to(tl.bfloat16), mask=(i < rows)[:, None] & (j < columns)[None, :])


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _store_errors(
    total, x, residual, row, column, rows, d: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DESCRIBED: tl.constexpr
):  # fmt: skip
    error = _tile(x, row, column, rows, d, M, D, DESCRIBED).to(tl.float32) - total
    _store_tile(residual, row, column, rows, d, error, M, D, DESCRIBED)
    return tl.sum(error * error, 1)


@triton.jit
def _decode_all(
    dense, scores, theta, w, x, residual, energy, rows, n, d: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    L: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    if tl.load(dense) > 0:
        first = tl.program_id(1) * M
        column = tl.program_id(0) * D
        total = tl.zeros((M, D), tl.float32)
        for start in range(0, n, L):
            latent = start + tl.arange(0, L)
            limit = tl.load(theta + latent, mask=latent < n, other=float("inf"))
            score = _tile(scores, first, start, rows, n, M, L, DESCRIBED)
            z = tl.where(score.to(tl.float32) > limit[None, :], score, tl.zeros_like(score))
            total = tl.dot(z, _tile(w, start, column, n, d, L, D, DESCRIBED), total)
        left, right = _halves(total, M, D)
        squares = _store_errors(left, x, residual, first, column, rows, d, M, D // 2, DESCRIBED)
        squares += _store_errors(right, x, residual, first, column + D // 2, rows, d, M, D // 2, DESCRIBED)
        row = first + tl.arange(0, M)
        tl.store(energy + tl.program_id(0) * rows + row, squares, mask=row < rows)


@triton.jit
def _store_slopes(
    total, scores, theta, slopes, sums, counts, block, first, rows, n, half, M: tl.constexpr, N: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """A part of a product's columns: slopes of its active pairs, z in place of its scores, its sums over tokens."""
    latent = first + tl.arange(0, N)
    known = latent < n
    limit = tl.load(theta + latent, mask=known, other=float("inf"))[None, :]
    score = _tile(scores, block * M, first, rows, n, M, N, DESCRIBED).to(tl.float32)
    here = (block * M + tl.arange(0, M) < rows)[:, None]
    above, near = beside(score, limit, here & known[None, :], half)
    slope = tl.where(above, total, 0.0)
    _store_tile(slopes, block * M, first, rows, n, slope, M, N, DESCRIBED)
    _store_tile(scores, block * M, first, rows, n, tl.where(above, score, 0.0), M, N, DESCRIBED)
    to = tl.cast(block, tl.int64) * n + latent
    tl.store(sums + 2 * to, tl.sum(slope, 0), mask=known)
    tl.store(sums + 2 * to + 1, tl.sum(tl.where(near, total, 0.0), 0), mask=known)
    # Both numbers, of fewer than 2^16 tokens, in one.
    tl.store(counts + to, tl.sum(above.to(tl.int32) + (near.to(tl.int32) << 16), 0), mask=known)


@triton.jit
def _slopes_of_all(
    dense, residual, w, scores, theta, slopes, sums, counts, rows, n, half, d: tl.constexpr, G: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Slopes of active pairs, z in place of the scores, and each block's share of the sums over tokens."""
    if tl.load(dense) > 0:
        columns = tl.cdiv(n, N)
        blocks = tl.cdiv(rows, M)
        for part in range(tl.program_id(0), blocks * columns, tl.num_programs(0)):
            first = part // (G * columns) * G
            together = tl.minimum(blocks - first, G)
            inside = part % (G * columns)
            block = first + inside % together
            latent = inside // together * N
            total = tl.zeros((M, N), tl.float32)
            for start in range(0, d, D):
                left = _tile(residual, block * M, start, rows, d, M, D, DESCRIBED)
                total = tl.dot(left, _tile(w, latent, start, n, d, N, D, DESCRIBED).T, total)
            # In four parts, as all at once would want too many registers.
            left, right = _halves(total, M, N)
            one, two = _halves(left, M, N // 2)
            to = (scores, theta, slopes, sums, counts, block)
            of = (rows, n, half)
            _store_slopes(one, *to, latent, *of, M, N // 4, DESCRIBED)
            _store_slopes(two, *to, latent + N // 4, *of, M, N // 4, DESCRIBED)
            one, two = _halves(right, M, N // 2)
            _store_slopes(one, *to, latent + N // 2, *of, M, N // 4, DESCRIBED)
            _store_slopes(two, *to, latent + N // 4 * 3, *of, M, N // 4, DESCRIBED)


@triton.jit
def _weights_of_all(
    dense, of_pairs, of_tokens, out, rows, n, factor, d: tl.constexpr, N: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """out[i] = factor * sum over tokens: of_pairs[b, i] of_tokens[b]."""
    if tl.load(dense) > 0:
        across = tl.cdiv(d, D)
        for part in range(tl.program_id(0), tl.cdiv(n, N) * across, tl.num_programs(0)):
            latent, column = part // across * N, part % across * D
            total = tl.zeros((N, D), tl.float32)
            for first in range(0, rows, T):
                left = _tile(of_pairs, first, latent, rows, n, T, N, DESCRIBED).T
                total = tl.dot(left, _tile(of_tokens, first, column, rows, d, T, D, DESCRIBED), total)
            left, right = _halves(total * factor, N, D)
            _store_tile(out, latent, column, n, d, left, N, D // 2, DESCRIBED)
            _store_tile(out, latent, column + D // 2, n, d, right, N, D // 2, DESCRIBED)


@triton.jit
def _latent_sums(
    dense, sums, counts, out, near, w, blocks, n, factor, d: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    if tl.load(dense) > 0:
        latent = tl.program_id(0) * L + tl.arange(0, L)
        known = latent < n
        bias = tl.zeros((L,), tl.float32)
        near_slope = tl.zeros((L,), tl.float32)
        near_count = tl.zeros((L,), tl.int32)
        fired = tl.zeros((L,), tl.int32)
        for block in range(blocks):
            at = tl.cast(block, tl.int64) * n + latent
            bias += tl.load(sums + 2 * at, mask=known, other=0.0)
            near_slope += tl.load(sums + 2 * at + 1, mask=known, other=0.0)
            count = tl.load(counts + at, mask=known, other=0)
            fired += count & 0xFFFF
            near_count += count >> 16
        tl.store(out.grad_b_N + latent, bias * factor, mask=known)
        tl.store(near + latent, near_slope, mask=known)
        tl.store(near + n + latent, near_count.to(tl.float32), mask=known)
        tl.store(out.counts_N + latent, fired, mask=known)
        tl.store(out.touched_N + latent, tl.full((L,), 1, tl.int32), mask=known)
        squares = tl.zeros((L, D), tl.float32)
        along = tl.zeros((L, D), tl.float32)
        for start in range(0, d, D):
            o = start + tl.arange(0, D)
            both = known[:, None] & (o < d)[None, :]
            at = latent.to(tl.int64)[:, None] * d + o[None, :]
            dec = tl.load(out.grad_dec_ND + at, mask=both, other=0.0).to(tl.float32)
            enc = tl.load(out.grad_enc_ND + at, mask=both, other=0.0).to(tl.float32)
            squares += dec * dec + enc * enc
            along += dec * tl.load(w + at, mask=both, other=0.0).to(tl.float32)
        tl.store(out.along_N + latent, tl.sum(along, 1), mask=known)
        tl.store(out.square_SN + latent, tl.sum(squares, 1), mask=known)
        for part in tl.static_range(1, S):
            tl.store(out.square_SN + part * n + latent, tl.zeros((L,), tl.float32), mask=known)


class DenseStep:
    """What the pairs would give, of all scores; in buffers made once."""

    def __init__(self, rows: int, num_latents: int, d: int, device: torch.device) -> None:
        self._blocks = triton.cdiv(rows, TILE)
        self._described = has_descriptors(device, num_latents)
        self._slopes_BN = torch.empty(rows, num_latents, dtype=torch.bfloat16, device=device)
        self._sums = torch.empty(self._blocks, num_latents, SUMS, device=device)
        self._counts = torch.empty(self._blocks, num_latents, dtype=torch.int32, device=device)
        self._energy = torch.zeros(triton.cdiv(d, WIDE), rows, device=device)

    def decode(
        self, encode: ThresholdEncoder, x_BD: Tensor, w_dec_ND: Tensor, residual_BGD: Tensor, energy_2B: Tensor
    ) -> None:
        """Residuals and their squares, as `residual.residuals`."""
        (rows, d), n = x_BD.shape, len(w_dec_ND)
        tile, half = self._tile, (TILE, WIDE // 2)
        _decode_all[(triton.cdiv(d, WIDE), self._blocks)](
            encode.dense, tile(encode.scores_BN, TILE, STEP), encode.theta_N, tile(w_dec_ND, STEP, WIDE),
            tile(x_BD, *half), tile(residual_BGD.view(rows, d), *half), self._energy, rows, n, d, TILE, WIDE, STEP,
            self._described, num_warps=8, num_stages=3,
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
        residual_BD, scores_BN, slopes_BN = residual_BGD.view(rows, d), encode.scores_BN, self._slopes_BN
        tile, quarter, half = self._tile, (TILE, TILE // 4), (TILE, WIDE // 2)
        programs, columns = _multiprocessors(x_BD.device), triton.cdiv(n, TILE)
        # Two programs a processor: one's products go on while the other stores.
        _slopes_of_all[(min(2 * programs, self._blocks * columns),)](
            encode.dense, tile(residual_BD, TILE, STEP), tile(w_dec_ND, TILE, STEP), tile(scores_BN, *quarter),
            encode.theta_N, tile(slopes_BN, *quarter), self._sums, self._counts, rows, n, encode.half, d, TOGETHER,
            TILE, TILE, STEP, self._described, num_warps=4 if self._described else 8, num_stages=3,
        )  # fmt: skip
        for of_pairs, of_tokens, matrix in (
            (scores_BN, residual_BD, out.grad_dec_ND),
            (slopes_BN, x_BD, out.grad_enc_ND),
        ):
            _weights_of_all[(min(programs, triton.cdiv(d, WIDE) * columns),)](
                encode.dense, tile(of_pairs, STEP, TILE), tile(of_tokens, STEP, WIDE), tile(matrix, *half), rows, n,
                factor, d, TILE, WIDE, STEP, self._described, num_warps=8, num_stages=3,
            )  # fmt: skip
        _latent_sums[(triton.cdiv(n, LATENTS),)](
            encode.dense, self._sums, self._counts, out.of_latents, encode.near_2N, w_dec_ND, self._blocks, n, factor, d,
            len(out.square_SN), LATENTS, 128, num_warps=4,
        )  # fmt: skip

    def _tile(self, matrix: Tensor, rows: int, columns: int) -> Tensor | TensorDescriptor:
        """As kernels read and write it: so many rows and columns at a time."""
        return TensorDescriptor.from_tensor(matrix, [rows, columns]) if self._described else matrix


def has_descriptors(device: torch.device, num_latents: int) -> bool:
    """Whether copies of tiles by descriptors, from the H100 on, take rows of these; not on GPUs for desks."""
    if num_latents % 8 or device.type != "cuda":
        return False
    shared = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
    return torch.cuda.get_device_capability(device) >= (9, 0) and bool(shared >= SHARED_BYTES)
