"""The kernels of attention within documents, for `flash`, which launches them.

A program has one tile of a document and one head, or a half of that tile. Rows of its inner loop come by pointers, or by
descriptors, which know nothing of documents: what they read of the next one has probability 0.

Shape letters: as in `flash`.
"""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
from __future__ import annotations

import math

import triton
import triton.language as tl

TILE = tl.constexpr(128)
"""Rows of a tile of `flash.tile_table`."""
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def scores_of(s, scale, cap, CAPPED: tl.constexpr):
    """Scores in units of log 2."""
    if CAPPED:
        # tanh by exp2: libdevice has no place in the interpreter, and constants, in triton 3.7, only on the right of a product.
        z = tl.exp2(tl.abs(s * scale) * (-2.0 * LOG2_E) / cap)
        bounded = cap * (1.0 - z) / (1.0 + z)
        return tl.where(s < 0, -bounded, bounded) * LOG2_E
    return s * (scale * LOG2_E)


@triton.jit
def through_cap(d_s, s, cap, CAPPED: tl.constexpr):
    """The gradient of scores from that of capped ones `s`."""
    if CAPPED:
        share = s / (cap * LOG2_E)
        d_s = d_s * (1.0 - share * share)
    return d_s


@triton.jit
def halves(total, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first and the second half of the columns: they lie in registers of the same threads."""
    return tl.split(tl.permute(tl.reshape(total, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))


@triton.jit
def store_gradient(
    to, stride, d, x, rows, inside, scales, per_row, begin, cos, sin,
    ROWS: tl.constexpr, DH: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """The gradient `d` of queries or keys `x`; or, if those were normed and turned, of what was, times their `scales`."""
    far = rows[:, None].to(tl.int64) * stride
    if TURNED:
        x = x.to(tl.float32)
        scale = tl.load(scales + rows.to(tl.int64) * per_row, mask=inside, other=0.0)
        a, b = halves((d - x * (tl.sum(d * x, 1) / DH)[:, None]) * scale[:, None], ROWS, DH)
        pair = tl.arange(0, DH // 2)[None]
        angle = (rows - begin)[:, None] * (DH // 2) + pair
        c = tl.load(cos + angle, mask=inside[:, None], other=0.0)
        s = tl.load(sin + angle, mask=inside[:, None], other=0.0)
        tl.store(to + far + pair, (a * c + b * s).to(to.dtype.element_ty), mask=inside[:, None])
        tl.store(to + far + DH // 2 + pair, (b * c - a * s).to(to.dtype.element_ty), mask=inside[:, None])
    else:
        tl.store(to + far + tl.arange(0, DH), d.to(to.dtype.element_ty), mask=inside[:, None])


@triton.jit
def own_rows(tiles, OWN: tl.constexpr):
    """(first row of a program, its document's begin and end)."""
    place = tl.program_id(0)
    tile = tiles + 3 * (place // (TILE // OWN))
    return tl.load(tile) + place % (TILE // OWN) * OWN, tl.load(tile + 1), tl.load(tile + 2)


@triton.jit
def own_slot(first, begin, OWN: tl.constexpr):
    """Where the first row of a program's document is in lists that have `TILE` places for each tile."""
    place = tl.program_id(0)
    return place // (TILE // OWN) * TILE - (first - begin) // TILE * TILE


@triton.jit
def rows_at(x, by_token, by_head, first, head, end, ROWS: tl.constexpr, DH: tl.constexpr, DESCRIBED: tl.constexpr):
    """Rows of a head [ROWS, DH]; beyond `end` zeros, or by a descriptor what is there."""
    if DESCRIBED:
        found = x.load([first, head * DH])
    else:
        rows = first + tl.arange(0, ROWS)
        far = rows[:, None].to(tl.int64) * by_token + head.to(tl.int64) * by_head
        found = tl.load(x + far + tl.arange(0, DH), mask=rows[:, None] < end, other=0.0)
    return found


@triton.jit
def forward_tiles(
    q, k, v, out, lse, tiles, qt, qh, kt, kh, vt, vh, ot, oh, num_tokens, scale, cap, window,
    bound, DH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    DESCRIBED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    first, begin, end = own_rows(tiles, M)
    head = tl.program_id(1)
    if first >= end:
        return
    rows, places, columns = first + tl.arange(0, M), tl.arange(0, DH), tl.arange(0, N)
    low, high = begin, end
    if WINDOW:
        low, high = tl.maximum(begin, first - window + 1), tl.minimum(end, first + M - 1 + window)
    query = rows_at(q, qt, qh, first, head, end, M, DH, False)
    most = tl.full([M], float("-inf"), tl.float32) if not BOUNDED else tl.zeros([M], tl.float32) + bound
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, DH], tl.float32)
    for start in range(low, high, N):
        near = start + columns
        key = rows_at(k, kt, kh, start, head, high, N, DH, DESCRIBED)
        s = tl.dot(query, tl.trans(key))
        if CAPPED:
            s = scores_of(s, scale, cap, CAPPED)
        if WINDOW:
            s = tl.where((near < high)[None] & (tl.abs(rows[:, None] - near[None]) < window), s, float("-inf"))
        elif start + N > high:
            s = tl.where((near < high)[None], s, float("-inf"))
        # Scaled after the maximum: with what is subtracted then, in one instruction.
        unit = 1.0 if CAPPED else scale * LOG2_E
        if BOUNDED:
            p = tl.exp2(s * unit - bound)
        else:
            new = tl.maximum(most, tl.max(s, 1) * unit)
            if WINDOW:  # a row may have met nothing yet
                base = tl.where(new == float("-inf"), 0.0, new)
            else:
                base = new
            p = tl.exp2(s * unit - base[:, None])
            shrink = tl.exp2(most - base)
            total, mixed = total * shrink, mixed * shrink[:, None]
            most = new
        total += tl.sum(p, 1)
        value = rows_at(v, vt, vh, start, head, high, N, DH, DESCRIBED)
        mixed = tl.dot(p.to(value.dtype), value, mixed)
    inside = rows < end
    head = head.to(tl.int64)
    tl.store(
        out + rows[:, None].to(tl.int64) * ot + head * oh + places,
        (mixed / total[:, None]).to(out.dtype.element_ty),
        mask=inside[:, None],
    )
    tl.store(lse + head * num_tokens + rows, most + tl.log2(total), mask=inside)


@triton.jit
def backward_queries(
    q, k, v, out, grad, lse, levels, delta, grad_q, scales, cos, sin, tiles, qt, qh, kt, kh, vt, vh, ot, oh, gt, gh, at, ah,
    num_tokens, scale, cap, window, heads,
    DH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    DESCRIBED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    first, begin, end = own_rows(tiles, M)
    head = tl.program_id(1)
    if first >= end:
        return
    rows, columns = first + tl.arange(0, M), tl.arange(0, N)
    low, high = begin, end
    if WINDOW:
        low, high = tl.maximum(begin, first - window + 1), tl.minimum(end, first + M - 1 + window)
    inside = rows < end
    query = rows_at(q, qt, qh, first, head, end, M, DH, False)
    d_out = rows_at(grad, gt, gh, first, head, end, M, DH, False)
    made = rows_at(out, ot, oh, first, head, end, M, DH, False)
    along = tl.sum(made.to(tl.float32) * d_out.to(tl.float32), 1)
    line = head.to(tl.int64) * num_tokens
    level = tl.load(lse + line + rows, mask=inside, other=float("inf"))
    if DESCRIBED:
        # Aligned to documents, and beyond them what gives a probability of 0.
        slots = head.to(tl.int64) * tl.num_programs(0) * M + own_slot(first, begin, M) + rows - begin
        tl.store(levels + slots, level)
        tl.store(delta + slots, along)
    else:
        tl.store(delta + line + rows, along, mask=inside)
    d_query = tl.zeros([M, DH], tl.float32)
    for start in range(low, high, N):
        near = start + columns
        key = rows_at(k, kt, kh, start, head, high, N, DH, DESCRIBED)
        value = rows_at(v, vt, vh, start, head, high, N, DH, DESCRIBED)
        s = scores_of(tl.dot(query, tl.trans(key)), scale, cap, CAPPED)
        p = tl.exp2(s - level[:, None])
        seen = (near < high)[None]
        if WINDOW:
            seen = seen & (tl.abs(rows[:, None] - near[None]) < window)
        p = tl.where(seen, p, 0.0)
        d_s = through_cap(p * (tl.dot(d_out, tl.trans(value)) - along[:, None]), s, cap, CAPPED)
        d_query = tl.dot(d_s.to(key.dtype), key, d_query)
    store_gradient(
        grad_q + head.to(tl.int64) * ah, at, d_query * scale, query, rows, inside, scales + head, 2 * heads, begin,
        cos, sin, M, DH, TURNED,
    )  # fmt: skip


@triton.jit
def backward_keys(
    q, k, v, grad, lse, delta, grad_k, grad_v, scales, norms, cos, sin, tiles,
    qt, qh, kt, kh, vt, vh, gt, gh, at, ah, num_tokens, scale, cap, window, heads,
    DH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    DESCRIBED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    first, begin, end = own_rows(tiles, M)
    head = tl.program_id(1)
    if first >= end:
        return
    near, places, columns = first + tl.arange(0, M), tl.arange(0, DH), tl.arange(0, N)
    low, high = begin, end
    if WINDOW:
        low, high = tl.maximum(begin, first - window + 1), tl.minimum(end, first + M - 1 + window)
    slot = own_slot(first, begin, M) - begin
    if DESCRIBED:
        low = begin + (low - begin) // N * N
    key = rows_at(k, kt, kh, first, head, end, M, DH, False)
    value = rows_at(v, vt, vh, first, head, end, M, DH, False)
    line = head.to(tl.int64) * num_tokens
    d_key, d_value = tl.zeros([M, DH], tl.float32), tl.zeros([M, DH], tl.float32)
    for start in range(low, high, N):
        rows = start + columns
        # Rows that are not there have probability 0; columns that are not have sums that are not stored.
        if DESCRIBED:
            level = tl.reshape(lse.load([head, slot + start]), [N])
            along = tl.reshape(delta.load([head, slot + start]), [N])
        else:
            level = tl.load(lse + line + rows, mask=rows < high, other=float("inf"))
            along = tl.load(delta + line + rows, mask=rows < high, other=0.0)
        query = rows_at(q, qt, qh, start, head, high, N, DH, DESCRIBED)
        d_out = rows_at(grad, gt, gh, start, head, high, N, DH, DESCRIBED)
        s = scores_of(tl.dot(key, tl.trans(query)), scale, cap, CAPPED)
        p = tl.exp2(s - level[None])
        if WINDOW:
            p = tl.where(tl.abs(near[:, None] - rows[None]) < window, p, 0.0)
        d_value = tl.dot(p.to(d_out.dtype), d_out, d_value)
        d_s = through_cap(p * (tl.dot(value, tl.trans(d_out)) - along[None]), s, cap, CAPPED)
        d_key = tl.dot(d_s.to(query.dtype), query, d_key)
    there = near < end
    to = head.to(tl.int64) * ah
    store_gradient(
        grad_k + to, at, d_key * scale, key, near, there, scales + heads + head, 2 * heads, begin, cos, sin, M, DH,
        TURNED,
    )  # fmt: skip
    if TURNED:
        d_value *= tl.load(norms + near, mask=there, other=0.0)[:, None]
    far = near[:, None].to(tl.int64) * at + to
    tl.store(grad_v + far + places, d_value.to(grad_v.dtype.element_ty), mask=there[:, None])
