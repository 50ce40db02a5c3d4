"""Products of the UNet's training step with what follows them in their epilogues, as Triton kernels with descriptors.

The stream's norm is a number a row, so it is applied to a product's result: rms_norm(x) Wᵀ = n (x Wᵀ), n = 1 / sqrt(mean x^2 +
eps). Gradients of results are stored times n, so that both further products, with x and with W, take them as they are, and
the normed stream is never stored. Squares of ReLU are stored alone: their roots are what the backward wants.

Shape letters: T tokens of the pack, D residual width, F feed-forward width, P parts of a sum over a row, H heads, Dh width
of a head, N columns of a product's result, K its inner dimension.
"""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from plmsae_cli.plm.flash import halves
from plmsae_cli.plm.gradients import EPSILON

_NEIGHBOURS = 8
"""Rows of tiles that run together, so that they find each other's operands in the cache."""


class Tile(NamedTuple):
    """How a product runs."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    resident: int = 1
    """Programs on a multiprocessor."""


UP = Tile(128, 256, 64, 8, 3)
SLOPES = Tile(128, 256, 64, 8, 3)
QUERIES = Tile(128, 256, 64, 8, 3)


@cache
def _processors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def multiprocessors(like: Tensor) -> int:
    """Of a tensor's GPU; some few where kernels are interpreted."""
    return _processors(like.device.index) if like.is_cuda else 4


@triton.jit
def _norm(squares, rows, there, width, eps, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """1 / sqrt(mean square + eps) of rows, from parts of their sums of squares."""
    part = tl.arange(0, BLOCK)
    found = tl.load(
        squares + rows[:, None].to(tl.int64) * PARTS + part[None],
        mask=there[:, None] & (part[None] < PARTS),
        other=0.0,
    )
    return tl.rsqrt(tl.sum(found, 1) / width + eps)


@triton.jit(do_not_specialize=["num_rows"])
def _up(
    x, weight, squares, out, num_rows, eps, width: tl.constexpr, depth: tl.constexpr, programs: tl.constexpr,
    PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    high, wide = tl.cdiv(num_rows, ROWS), tl.cdiv(width, COLUMNS)
    for tile in tl.range(tl.program_id(0), high * wide, programs, flatten=True):
        first = tile // (NEIGHBOURS * wide) * NEIGHBOURS
        together = tl.minimum(high - first, NEIGHBOURS)
        inside = tile % (NEIGHBOURS * wide)
        row, column = (first + inside % together) * ROWS, inside // together * COLUMNS
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, depth, DEPTH):  # beyond the edges a descriptor reads zeros
            total = tl.dot(x.load([row, k]), weight.load([column, k]).T, total)
        rows = row + tl.arange(0, ROWS)
        norm = _norm(squares, rows, rows < num_rows, depth, eps, PARTS, PARTS_BLOCK)
        total = tl.maximum(total * norm[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
        out.store([row, column], (total * total).to(out.dtype))


@triton.jit(do_not_specialize=["num_rows"])
def _slopes(
    grad, weight, squared, squares, out, sums, num_rows, eps, width: tl.constexpr, depth: tl.constexpr,
    programs: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    high, wide = tl.cdiv(num_rows, ROWS), tl.cdiv(width, COLUMNS)
    for tile in tl.range(tl.program_id(0), high * wide, programs, flatten=True):
        first = tile // (NEIGHBOURS * wide) * NEIGHBOURS
        together = tl.minimum(high - first, NEIGHBOURS)
        inside = tile % (NEIGHBOURS * wide)
        row, column = (first + inside % together) * ROWS, inside // together * COLUMNS
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, depth, DEPTH):
            total = tl.dot(grad.load([row, k]), weight.load([k, column]), total)
        # Halves follow one another: registers hold no whole tile beside its sums.
        a, b = halves(total, ROWS, COLUMNS)
        rows = row + tl.arange(0, ROWS)
        there = rows < num_rows
        norm = _norm(squares, rows, there, depth, eps, PARTS, PARTS_BLOCK)
        along = tl.zeros([ROWS], tl.float32)
        for half in tl.static_range(2):
            places = column + half * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
            root = tl.sqrt(
                tl.load(
                    squared + rows[:, None].to(tl.int64) * width + places[None],
                    mask=there[:, None] & (places < width)[None],
                    other=0.0,
                ).to(tl.float32)
            )
            slope = 2.0 * root * (a if half == 0 else b)
            # Times ReLU's argument: what the gradient of the stream has along the stream.
            along += tl.sum(slope * root, 1)
            out.store([row, column + half * (COLUMNS // 2)], (slope * norm[:, None]).to(out.dtype))
        tl.store(sums + rows.to(tl.int64) * wide + column // COLUMNS, along, mask=there)


@triton.jit(do_not_specialize=["num_rows"])
def _queries(
    x, weight, squares, out, scales, table, tokens, position, cos, sin, num_rows, eps,
    heads: tl.constexpr, depth: tl.constexpr, programs: tl.constexpr, MIXED: tl.constexpr,
    PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    # A tile has the first halves of some heads and, in other columns of the weight, their second halves.
    TOGETHER: tl.constexpr = COLUMNS // (2 * HALF)
    high, wide = tl.cdiv(num_rows, ROWS), 3 * heads // TOGETHER
    for tile in tl.range(tl.program_id(0), high * wide, programs, flatten=True):
        first = tile // (NEIGHBOURS * wide) * NEIGHBOURS
        together = tl.minimum(high - first, NEIGHBOURS)
        inside = tile % (NEIGHBOURS * wide)
        row, column = (first + inside % together) * ROWS, inside // together * COLUMNS
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, depth, DEPTH):
            total = tl.dot(x.load([row, k]), weight.load([column, k]).T, total)
        a, b = halves(total, ROWS, COLUMNS)
        rows, pair = row + tl.arange(0, ROWS), tl.arange(0, HALF)
        there = rows < num_rows
        norm = _norm(squares, rows, there, depth, eps, PARTS, PARTS_BLOCK)
        a = tl.reshape(a * norm[:, None], [ROWS, TOGETHER, HALF])
        b = tl.reshape(b * norm[:, None], [ROWS, TOGETHER, HALF])
        head = column // (2 * HALF) + tl.arange(0, TOGETHER)
        inner = there[:, None, None]
        if column < 4 * heads * HALF:  # queries and keys
            scale = tl.rsqrt((tl.sum(a * a, 2) + tl.sum(b * b, 2)) / (2 * HALF) + eps)
            where = rows[:, None].to(tl.int64) * (2 * heads) + head[None]
            tl.store(scales + where, scale * norm[:, None], mask=there[:, None])
            angle = tl.load(position + rows, mask=there, other=0)[:, None] * HALF + pair[None]
            c = tl.load(cos + angle, mask=there[:, None], other=0.0)[:, None, :]
            s = tl.load(sin + angle, mask=there[:, None], other=0.0)[:, None, :]
            a, b = a * scale[:, :, None], b * scale[:, :, None]
            a, b = a * c - b * s, b * c + a * s
        elif MIXED:
            token = tl.load(tokens + rows, mask=there, other=0)
            start = token[:, None, None] * (heads * 2 * HALF) + (head - 2 * heads)[None, :, None] * (2 * HALF)
            start += pair[None, None, :]
            a += tl.load(table + start, mask=inner, other=0.0).to(tl.float32)
            b += tl.load(table + start + HALF, mask=inner, other=0.0).to(tl.float32)
        to = out + rows[:, None, None].to(tl.int64) * (6 * heads * HALF) + head[None, :, None] * (2 * HALF)
        to += pair[None, None, :]
        tl.store(to, a.to(out.dtype.element_ty), mask=inner)
        tl.store(to + HALF, b.to(out.dtype.element_ty), mask=inner)


def _launch(kernel: Any, tile: Tile, num_rows: int, wide: int, like: Tensor, *given: Any, **fixed: Any) -> None:
    programs = min(multiprocessors(like) * tile.resident, triton.cdiv(num_rows, tile.rows) * wide)
    with torch.cuda.device_of(like):  # Triton launches on the current one
        kernel[(programs,)](
            *given, num_rows, EPSILON, programs=programs, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
            NEIGHBOURS=_NEIGHBOURS, num_warps=tile.warps, num_stages=tile.stages, **fixed,
        )  # fmt: skip


def _parts(squares_TP: Tensor) -> dict[str, int]:
    parts = squares_TP.shape[1]
    return {"PARTS": parts, "PARTS_BLOCK": triton.next_power_of_2(parts)}


def _view(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, [rows, columns])


def up(x_TD: Tensor, squares_TP: Tensor, weight_FD: Tensor, tile: Tile = UP) -> Tensor:
    """relu(n x Wᵀ)^2 [T, F], with the norm n of each row by the sum of its `squares`, float32; D and F multiples of 8."""
    (num_rows, depth), width = x_TD.shape, weight_FD.shape[0]
    out_TF = x_TD.new_empty(num_rows, width)
    _launch(
        _up, tile, num_rows, triton.cdiv(width, tile.columns), x_TD,
        _view(x_TD, tile.rows, tile.depth), _view(weight_FD, tile.columns, tile.depth), squares_TP,
        _view(out_TF, tile.rows, tile.columns), width=width, depth=depth, **_parts(squares_TP),
    )  # fmt: skip
    return out_TF


def slopes(
    grad_TD: Tensor, weight_DF: Tensor, squared_TF: Tensor, squares_TP: Tensor, tile: Tile = SLOPES
) -> tuple[Tensor, Tensor]:
    """What `up` gave back through the matrix after it: with ds = grad W, (n 2 sqrt(squared) ds [T, F], parts of the sums of
    2 squared ds over rows, float32 [T, P])."""
    (num_rows, depth), width = grad_TD.shape, weight_DF.shape[1]
    out_TF, wide = squared_TF.new_empty(num_rows, width), triton.cdiv(width, tile.columns)
    sums_TP = squares_TP.new_empty(num_rows, wide)
    _launch(
        _slopes, tile, num_rows, wide, grad_TD,
        _view(grad_TD, tile.rows, tile.depth), _view(weight_DF, tile.depth, tile.columns), squared_TF, squares_TP,
        _view(out_TF, tile.rows, tile.columns // 2), sums_TP, width=width, depth=depth, **_parts(squares_TP),
    )  # fmt: skip
    return out_TF, sums_TP


def fits(num_heads: int, head_dim: int, tile: Tile = QUERIES) -> bool:
    """Whether `queries` has tiles for such heads."""
    return head_dim in (64, 128) and num_heads % (tile.columns // head_dim) == 0


def queries(
    x_TD: Tensor,
    squares_TP: Tensor,
    weight_3DD: Tensor,
    table_VD: Tensor | None,
    tokens_T: Tensor,
    position_T: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    tile: Tile = QUERIES,
) -> tuple[Tensor, Tensor]:
    """(q, k and v [T, 3, H, Dh], what n x Wᵀ was multiplied with, times n, to become normed q and k, float32 [T, 2 H]).

    q and k are normed and turned by the tables' rows at `position`, fp32 [L, 1, Dh / 2]; v has the token's row of the table
    added. `tokens`, `position`: int32 or int64.
    """
    num_rows, depth = x_TD.shape
    half = depth // num_heads // 2
    group = tile.columns // (2 * half)
    rearranged = weight_3DD.view(-1, group, 2, half, depth).transpose(1, 2).reshape(3 * depth, depth)
    out = x_TD.new_empty(num_rows, 3, num_heads, 2 * half)
    scales = squares_TP.new_empty(num_rows, 2 * num_heads)
    mixed = table_VD is not None
    _launch(
        _queries, tile, num_rows, 3 * num_heads // group, x_TD,
        _view(x_TD, tile.rows, tile.depth), _view(rearranged, tile.columns, tile.depth), squares_TP, out, scales,
        table_VD if mixed else x_TD, tokens_T, position_T, cos, sin,
        heads=num_heads, depth=depth, MIXED=mixed, HALF=half, **_parts(squares_TP),
    )  # fmt: skip
    return out, scales
