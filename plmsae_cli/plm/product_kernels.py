"""The kernels of products with what follows them in their epilogues, for `products`, which launches them.

Programs stay and take one tile after another; a tile's epilogue goes on while the operands of the next are on their way.

Shape letters: as in `products`.
"""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from plmsae_cli.plm.flash_kernels import halves


@triton.jit
def place_of(tile, high, wide, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """First row and column of a tile: so many rows of tiles run together, to find each other's operands in the cache."""
    first = tile // (NEIGHBOURS * wide) * NEIGHBOURS
    together = tl.minimum(high - first, NEIGHBOURS)
    inside = tile % (NEIGHBOURS * wide)
    return (first + inside % together) * ROWS, inside // together * COLUMNS


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
def up_tiles(
    x, weight, squares, out, num_rows, eps, width: tl.constexpr, depth: tl.constexpr, programs: tl.constexpr,
    PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    high, wide = tl.cdiv(num_rows, ROWS), tl.cdiv(width, COLUMNS)
    for tile in tl.range(tl.program_id(0), high * wide, programs, flatten=True):
        row, column = place_of(tile, high, wide, ROWS, COLUMNS, NEIGHBOURS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, depth, DEPTH):  # beyond the edges a descriptor reads zeros
            total = tl.dot(x.load([row, k]), weight.load([column, k]).T, total)
        rows = row + tl.arange(0, ROWS)
        norm = _norm(squares, rows, rows < num_rows, depth, eps, PARTS, PARTS_BLOCK)
        total = tl.maximum(total * norm[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
        out.store([row, column], (total * total).to(out.dtype))


@triton.jit
def _part(x, rows, places, width: tl.constexpr, num_rows):
    inside = (rows < num_rows)[:, None] & (places < width)[None]
    return tl.load(x + rows[:, None].to(tl.int64) * width + places[None], mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def slopes_tiles(
    grad, weight, squared, squares, out, num_rows, eps, width: tl.constexpr, depth: tl.constexpr,
    programs: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = COLUMNS // 2
    high, wide = tl.cdiv(num_rows, ROWS), tl.cdiv(width, COLUMNS)
    for tile in tl.range(tl.program_id(0), high * wide, programs, flatten=True):
        row, column = place_of(tile, high, wide, ROWS, COLUMNS, NEIGHBOURS)
        rows = row + tl.arange(0, ROWS)
        places = column + tl.arange(0, HALF)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, depth, DEPTH):
            total = tl.dot(grad.load([row, k]), weight.load([k, column]), total)
        # Halves follow one another: registers hold no whole tile beside its results.
        a, b = halves(total, ROWS, COLUMNS)
        norm = 2.0 * _norm(squares, rows, rows < num_rows, depth, eps, PARTS, PARTS_BLOCK)
        c = _part(squared, rows, places, width, num_rows)
        out.store([row, column], (tl.sqrt(c) * a * norm[:, None]).to(out.dtype))
        d = _part(squared, rows, places + HALF, width, num_rows)
        out.store([row, column + HALF], (tl.sqrt(d) * b * norm[:, None]).to(out.dtype))


@triton.jit(do_not_specialize=["num_rows"])
def added_tiles(
    a, weight, x, out, squares, num_rows, eps, width: tl.constexpr, depth: tl.constexpr, programs: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = COLUMNS // 2
    high, wide = tl.cdiv(num_rows, ROWS), tl.cdiv(width, COLUMNS)
    for tile in tl.range(tl.program_id(0), high * wide, programs, flatten=True):
        row, column = place_of(tile, high, wide, ROWS, COLUMNS, NEIGHBOURS)
        rows = row + tl.arange(0, ROWS)
        places = column + tl.arange(0, HALF)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, depth, DEPTH):
            total = tl.dot(a.load([row, k]), weight.load([column, k]).T, total)
        b, c = halves(total, ROWS, COLUMNS)
        b += _part(x, rows, places, width, num_rows)
        out.store([row, column], b.to(out.dtype))
        c += _part(x, rows, places + HALF, width, num_rows)
        out.store([row, column + HALF], c.to(out.dtype))
        # Before rounding: what is rounded twice over is converted one by one.
        tl.store(squares + rows.to(tl.int64) * wide + column // COLUMNS, tl.sum(b * b + c * c, 1), mask=rows < num_rows)


@triton.jit
def _head(total, i: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DH: tl.constexpr):
    """Columns of one of at most two heads."""
    if COLUMNS == DH:
        found = total
    else:
        a, b = halves(total, ROWS, COLUMNS)
        found = a if i == 0 else b
    return found


@triton.jit(do_not_specialize=["num_rows"])
def queries_tiles(
    x, weight, squares, out, scales, position, cos, sin, num_rows, eps,
    heads: tl.constexpr, depth: tl.constexpr, programs: tl.constexpr,
    PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    DH: tl.constexpr = 2 * HALF
    high, wide = tl.cdiv(num_rows, ROWS), 2 * heads * DH // COLUMNS
    for tile in tl.range(tl.program_id(0), high * wide, programs, flatten=True):
        row, column = place_of(tile, high, wide, ROWS, COLUMNS, NEIGHBOURS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, depth, DEPTH):
            total = tl.dot(x.load([row, k]), weight.load([column, k]).T, total)
        rows = row + tl.arange(0, ROWS)
        there = rows < num_rows
        norm = _norm(squares, rows, there, depth, eps, PARTS, PARTS_BLOCK)
        angle = tl.load(position + rows, mask=there, other=0)[:, None] * HALF + tl.arange(0, HALF)[None]
        c, s = tl.load(cos + angle), tl.load(sin + angle)
        to = scales + rows.to(tl.int64) * (2 * heads) + column // DH
        for i in tl.static_range(COLUMNS // DH):
            part = _head(total, i, ROWS, COLUMNS, DH) * norm[:, None]
            scale = tl.rsqrt(tl.sum(part * part, 1) / DH + eps)
            tl.store(to + i, scale * norm, mask=there)
            a, b = halves(part * scale[:, None], ROWS, DH)
            turned = tl.permute(tl.join(a * c - b * s, b * c + a * s), (0, 2, 1))
            out.store([row, column + i * DH], tl.reshape(turned, [ROWS, DH]).to(out.dtype))


@triton.jit(do_not_specialize=["num_rows"])
def values_tiles(
    x, weight, squares, out, table, tokens, num_rows, eps,
    heads: tl.constexpr, depth: tl.constexpr, programs: tl.constexpr, MIXED: tl.constexpr,
    PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    DH: tl.constexpr = 2 * HALF
    high, wide = tl.cdiv(num_rows, ROWS), heads * DH // COLUMNS
    for tile in tl.range(tl.program_id(0), high * wide, programs, flatten=True):
        row, column = place_of(tile, high, wide, ROWS, COLUMNS, NEIGHBOURS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, depth, DEPTH):
            total = tl.dot(x.load([row, k]), weight.load([2 * heads * DH + column, k]).T, total)
        rows = row + tl.arange(0, ROWS)
        there = rows < num_rows
        norm = _norm(squares, rows, there, depth, eps, PARTS, PARTS_BLOCK)
        for i in tl.static_range(COLUMNS // DH):
            part = _head(total, i, ROWS, COLUMNS, DH) * norm[:, None]
            places = column + i * DH
            if MIXED:
                start = table + tl.load(tokens + rows, mask=there, other=0)[:, None] * (heads * DH) + places
                part += tl.load(start + tl.arange(0, DH)).to(tl.float32)
            out.store([row, 2 * heads * DH + places], part.to(out.dtype))
