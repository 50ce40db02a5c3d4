"""The backward pass of attention, a whole document and head to a program: scores are computed once.

Tiles of keys follow one another, and each adds its share to the gradients of queries, which stay in the cache: a fixed order,
where programs of tiles would add atomically or compute scores a second time (`flash`). Documents must be short beside what
all processors do together; those of `flash.tile_table` start with the longest. From sm90 on, by descriptors.

Shape letters: as in `flash`.
"""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from plmsae_cli.plm.flash import TILE, Turned, options_of, scores_of, store_gradient, through_cap


class Shape(NamedTuple):
    """How the kernel runs."""

    rows: int
    """Queries of its inner loop."""
    warps: int
    stages: int


SHAPE = Shape(64, 8, 2)
LONGEST = 2048
"""Tokens of a document from where on programs of tiles are better."""


@triton.jit
def _prepare(
    out, grad, lse, tiles, levels, alongs, num_tokens, heads: tl.constexpr, DH: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """`lse`, and outputs times their gradients summed over a head's places, of each tile; beyond its document infinity, 0."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 2)
    if first >= end:
        return
    rows = first + tl.arange(0, N)
    inside = rows < end
    where = rows[:, None].to(tl.int64) * (heads * DH) + head * DH + tl.arange(0, DH)
    a = tl.load(out + where, mask=inside[:, None], other=0.0).to(tl.float32)
    b = tl.load(grad + where, mask=inside[:, None], other=0.0).to(tl.float32)
    to = (head * tl.num_programs(0) + tile) * N + tl.arange(0, N)
    tl.store(alongs + to, tl.sum(a * b, 1))
    tl.store(levels + to, tl.load(lse + head * num_tokens + rows, mask=inside, other=float("inf")))


@triton.jit
def _backward_documents(
    keys, queries, grads, levels, alongs, part, found, scales, norms, cos, sin, tiles, scale, cap, window, heads: tl.constexpr,
    DH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    first, begin, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    if (first > begin) | (first >= end):
        return
    places, columns, rows_of = tl.arange(0, DH), tl.arange(0, N), tl.arange(0, M)
    # Gradients of queries in blocks of [DH, M], in places of the document's own.
    part += (head.to(tl.int64) * tl.num_programs(0) + tile) * (N * DH)
    found += head * DH
    at: tl.constexpr = 3 * heads * DH
    block = places[:, None] * M + rows_of[None]
    if WINDOW:
        for start in range(begin, end, M):
            tl.store(part + (start - begin) * DH + block, tl.zeros([DH, M], tl.float32))
        tl.debug_barrier()
    for start_near in range(begin, end, N):
        near = start_near + columns
        there = (near < end)[:, None]
        # Rows beyond the document are another's; their probabilities are 0.
        key = keys.load([start_near, (heads + head) * DH])
        value = keys.load([start_near, (2 * heads + head) * DH])
        d_key, d_value = tl.zeros([N, DH], tl.float32), tl.zeros([N, DH], tl.float32)
        low, high = begin, end
        if WINDOW:
            low = begin + tl.maximum(0, start_near - window + 1 - begin) // M * M
            high = tl.minimum(end, start_near + N - 1 + window)
        for start in range(low, high, M):
            query = queries.load([start, head * DH])
            d_out = grads.load([start, head * DH])
            level = tl.reshape(levels.load([head, tile * N + start - begin]), [M])
            along = tl.reshape(alongs.load([head, tile * N + start - begin]), [M])
            s = scores_of(tl.dot(key, tl.trans(query)), scale, cap, CAPPED)
            p = tl.where(there, tl.exp2(s - level[None]), 0.0)
            if WINDOW:
                p = tl.where(tl.abs(near[:, None] - start - rows_of[None]) < window, p, 0.0)
            d_value = tl.dot(p.to(d_out.dtype), d_out, d_value)
            d_s = through_cap(p * (tl.dot(value, tl.trans(d_out)) - along[None]), s, cap, CAPPED).to(query.dtype)
            d_key = tl.dot(d_s, query, d_key)
            d_query = tl.dot(tl.trans(key), d_s)
            sums = part + (start - begin) * DH + block
            # Tiles of keys follow one another in one program: the sum has one order.
            if WINDOW:
                d_query += tl.load(sums)
            else:
                d_query += tl.load(sums, mask=(block >= 0) & (start_near > begin), other=0.0)
            tl.store(sums, d_query)
        tl.debug_barrier()
        store_gradient(
            found + heads * DH, at, d_key * scale, key, near, near < end, scales + heads + head, 2 * heads, begin,
            cos, sin, N, DH, True,
        )  # fmt: skip
        d_value *= tl.load(norms + near, mask=near < end, other=0.0)[:, None]
        far = near[:, None].to(tl.int64) * at + 2 * heads * DH + places
        tl.store(found + far, d_value.to(found.dtype.element_ty), mask=there)
    for start in range(begin, end, M):
        rows = start + rows_of
        inside = rows < end
        query = queries.load([start, head * DH])
        d_query = tl.trans(tl.load(part + (start - begin) * DH + block)) * scale
        store_gradient(
            found, at, d_query, query, rows, inside, scales + head, 2 * heads, begin, cos, sin, M, DH, True,
        )  # fmt: skip


def backward_documents(
    grad_THD: Tensor, qkv: Tensor, out_THD: Tensor, lse_HT: Tensor, tiles_N3: Tensor, window: int, cap: float,
    turned: Turned, shape: Shape = SHAPE,
) -> Tensor:  # fmt: skip
    """Gradients [T, 3, H, Dh] of what became q, k and v [T, 3, H, Dh] as `turned` says; all contiguous."""
    num_tokens, _, heads, width = qkv.shape
    found, slots = torch.empty_like(qkv), (heads, len(tiles_N3) * TILE)
    levels, alongs = lse_HT.new_empty(slots), lse_HT.new_empty(slots)
    part = lse_HT.new_empty(*slots, width)
    rows, view = shape.rows, TensorDescriptor.from_tensor
    flat, flat_grad = qkv.view(num_tokens, -1), grad_THD.view(num_tokens, -1)
    with torch.cuda.device_of(qkv):  # Triton launches on the current one
        _prepare[len(tiles_N3), heads](
            out_THD, grad_THD, lse_HT, tiles_N3, levels, alongs, num_tokens, heads, width, TILE, num_warps=8
        )  # fmt: skip
        _backward_documents[len(tiles_N3), heads](
            view(flat, [TILE, width]), view(flat, [rows, width]), view(flat_grad, [rows, width]),
            view(levels, [1, rows]), view(alongs, [1, rows]), part, found, *turned, tiles_N3, width**-0.5, cap, window,
            heads, M=rows, N=TILE, num_warps=shape.warps, num_stages=shape.stages, **options_of(width, window, cap),
        )  # fmt: skip
    return found
