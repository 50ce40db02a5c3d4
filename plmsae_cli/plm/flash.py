"""Attention within the documents of a packed stream as Triton kernels, forward and backward.

softmax(q kᵀ / sqrt(Dh)) v with a running maximum, scores never stored (Dao et al., FlashAttention-2, arXiv 2307.08691). A
program has one tile of a document and one head. Backward computes the scores twice, once for the gradient of the queries and
once for those of keys and values, so that no sum is atomic and steps repeat bit for bit.

Shape letters: T tokens of the pack, H heads, Dh width of a head, N tiles.
"""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128
"""Rows of a document that a program has."""
LOG2_E = tl.constexpr(math.log2(math.e))


class _Shape(NamedTuple):
    """How a kernel runs."""

    block: int
    """Rows of its inner loop."""
    warps: int
    stages: int


# By width of a head, the fastest of some ten each on an H200.
_FORWARD = {64: _Shape(64, 8, 3), 128: _Shape(64, 4, 2)}
_QUERIES = {64: _Shape(64, 4, 3), 128: _Shape(64, 8, 3)}
_KEYS = {64: _Shape(32, 4, 2), 128: _Shape(64, 8, 2)}
_LEAN = _Shape(32, 8, 2)
"""Where a multiprocessor has less shared memory than an A100's, and for other widths."""
_SHARED_BYTES = 160 << 10


@cache
def _ample(device_index: int | None) -> bool:
    index = torch.cuda.current_device() if device_index is None else device_index
    return bool(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"] >= _SHARED_BYTES)


def _shape(table: dict[int, _Shape], like: Tensor) -> _Shape:
    width = like.shape[2]
    return table.get(width, _LEAN) if width < 128 or not like.is_cuda or _ample(like.device.index) else _LEAN


def tile_table(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Tiles of all documents, those of the longest first: int32 [N, 3] of first row, document's begin and its end.

    N is known from shapes alone; rows that are left over are empty.
    """
    begin_S, end_S = cu_seqlens[:-1], cu_seqlens[1:]
    tiles_S = (end_S - begin_S + TILE - 1) // TILE
    last_S = tiles_S.cumsum(0)
    number_N = torch.arange(num_tokens // TILE + len(tiles_S), device=cu_seqlens.device)
    document_N = torch.searchsorted(last_S, number_N, right=True).clamp(max=len(tiles_S) - 1)
    begin_N, end_N = begin_S[document_N], end_S[document_N]
    first_N = begin_N + (number_N - (last_S - tiles_S)[document_N]) * TILE
    table_N3 = torch.stack([first_N, begin_N, end_N], dim=1)
    table_N3 = torch.where((first_N < end_N)[:, None], table_N3, 0)
    return table_N3[(begin_N - end_N).argsort(stable=True)].int()


@triton.jit
def scores_of(s, scale, cap, CAPPED: tl.constexpr):
    """Scores in units of log 2."""
    if CAPPED:
        # tanh by exp2: libdevice has no place in the interpreter.
        z = tl.exp2(-2.0 * LOG2_E * tl.abs(s * scale) / cap)
        bounded = cap * (1.0 - z) / (1.0 + z)
        return tl.where(s < 0, -bounded, bounded) * LOG2_E
    return s * (scale * LOG2_E)


@triton.jit
def through_cap(d_s, s, cap, CAPPED: tl.constexpr):
    """The gradient of scores from that of capped ones `s`."""
    if CAPPED:
        share = s / (LOG2_E * cap)
        d_s = d_s * (1.0 - share * share)
    return d_s


@triton.jit
def halves(total, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first and the second half of the columns: they lie in registers of the same threads."""
    return tl.split(tl.permute(tl.reshape(total, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))


@triton.jit
def store_gradient(to, stride, d, x, rows, inside, scales, per_row, begin, cos, sin, ROWS: tl.constexpr, DH: tl.constexpr, TURNED: tl.constexpr):
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
def _forward(
    q, k, v, out, lse, tiles, qt, qh, kt, kh, vt, vh, ot, oh, num_tokens, scale, cap, window,
    DH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, begin, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    if first >= end:
        return
    rows, places, columns = first + tl.arange(0, M), tl.arange(0, DH), tl.arange(0, N)
    low, high = begin, end
    if WINDOW:
        low, high = tl.maximum(begin, first - window + 1), tl.minimum(end, first + M - 1 + window)
    query = tl.load(q + rows[:, None].to(tl.int64) * qt + head * qh + places, mask=rows[:, None] < end, other=0.0)
    most = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, DH], tl.float32)
    for start in range(low, high, N):
        near = start + columns
        there = near[:, None] < high
        key = tl.load(k + near[:, None].to(tl.int64) * kt + head * kh + places, mask=there, other=0.0)
        s = scores_of(tl.dot(query, tl.trans(key)), scale, cap, CAPPED)
        if WINDOW:
            s = tl.where((near < high)[None] & (tl.abs(rows[:, None] - near[None]) < window), s, float("-inf"))
        elif start + N > high:
            s = tl.where((near < high)[None], s, float("-inf"))
        new = tl.maximum(most, tl.max(s, 1))
        if WINDOW:  # a row may have met nothing yet
            base = tl.where(new == float("-inf"), 0.0, new)
        else:
            base = new
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(most - base)
        total = total * shrink + tl.sum(p, 1)
        value = tl.load(v + near[:, None].to(tl.int64) * vt + head * vh + places, mask=there, other=0.0)
        mixed = tl.dot(p.to(value.dtype), value, mixed * shrink[:, None])
        most = new
    inside = rows < end
    tl.store(
        out + rows[:, None].to(tl.int64) * ot + head * oh + places,
        (mixed / total[:, None]).to(out.dtype.element_ty),
        mask=inside[:, None],
    )
    tl.store(lse + head * num_tokens + rows, most + tl.log2(total), mask=inside)


@triton.jit
def _backward_queries(
    q, k, v, out, grad, lse, delta, grad_q, scales, cos, sin, tiles, qt, qh, kt, kh, vt, vh, ot, oh, gt, gh, at, ah,
    num_tokens, scale, cap, window, heads,
    DH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, begin, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    if first >= end:
        return
    rows, places, columns = first + tl.arange(0, M), tl.arange(0, DH), tl.arange(0, N)
    low, high = begin, end
    if WINDOW:
        low, high = tl.maximum(begin, first - window + 1), tl.minimum(end, first + M - 1 + window)
    inside = rows < end
    far = rows[:, None].to(tl.int64)
    query = tl.load(q + far * qt + head * qh + places, mask=inside[:, None], other=0.0)
    d_out = tl.load(grad + far * gt + head * gh + places, mask=inside[:, None], other=0.0)
    made = tl.load(out + far * ot + head * oh + places, mask=inside[:, None], other=0.0)
    along = tl.sum(made.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta + head * num_tokens + rows, along, mask=inside)
    level = tl.load(lse + head * num_tokens + rows, mask=inside, other=float("inf"))
    d_query = tl.zeros([M, DH], tl.float32)
    for start in range(low, high, N):
        near = start + columns
        there = near[:, None] < high
        key = tl.load(k + near[:, None].to(tl.int64) * kt + head * kh + places, mask=there, other=0.0)
        value = tl.load(v + near[:, None].to(tl.int64) * vt + head * vh + places, mask=there, other=0.0)
        s = scores_of(tl.dot(query, tl.trans(key)), scale, cap, CAPPED)
        p = tl.exp2(s - level[:, None])
        seen = (near < high)[None]
        if WINDOW:
            seen = seen & (tl.abs(rows[:, None] - near[None]) < window)
        p = tl.where(seen, p, 0.0)
        d_s = through_cap(p * (tl.dot(d_out, tl.trans(value)) - along[:, None]), s, cap, CAPPED)
        d_query = tl.dot(d_s.to(key.dtype), key, d_query)
    store_gradient(
        grad_q + head * ah, at, d_query * scale, query, rows, inside, scales + head, 2 * heads, begin, cos, sin, M, DH,
        TURNED,
    )  # fmt: skip


@triton.jit
def _backward_keys(
    q, k, v, grad, lse, delta, grad_k, grad_v, scales, norms, cos, sin, tiles,
    qt, qh, kt, kh, vt, vh, gt, gh, at, ah, num_tokens, scale, cap, window, heads,
    DH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, begin, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    if first >= end:
        return
    near, places, rows_of = first + tl.arange(0, N), tl.arange(0, DH), tl.arange(0, M)
    low, high = begin, end
    if WINDOW:
        low, high = tl.maximum(begin, first - window + 1), tl.minimum(end, first + N - 1 + window)
    there = (near < end)[:, None]
    far = near[:, None].to(tl.int64)
    key = tl.load(k + far * kt + head * kh + places, mask=there, other=0.0)
    value = tl.load(v + far * vt + head * vh + places, mask=there, other=0.0)
    d_key, d_value = tl.zeros([N, DH], tl.float32), tl.zeros([N, DH], tl.float32)
    for start in range(low, high, M):
        rows = start + rows_of
        inside = rows < high
        query = tl.load(q + rows[:, None].to(tl.int64) * qt + head * qh + places, mask=inside[:, None], other=0.0)
        d_out = tl.load(grad + rows[:, None].to(tl.int64) * gt + head * gh + places, mask=inside[:, None], other=0.0)
        # Rows that are not there have probability 0; so have columns, whose sums are not stored.
        level = tl.load(lse + head * num_tokens + rows, mask=inside, other=float("inf"))
        along = tl.load(delta + head * num_tokens + rows, mask=inside, other=0.0)
        s = scores_of(tl.dot(key, tl.trans(query)), scale, cap, CAPPED)
        p = tl.exp2(s - level[None])
        if WINDOW:
            p = tl.where(tl.abs(near[:, None] - rows[None]) < window, p, 0.0)
        d_value = tl.dot(p.to(d_out.dtype), d_out, d_value)
        d_s = through_cap(p * (tl.dot(value, tl.trans(d_out)) - along[None]), s, cap, CAPPED)
        d_key = tl.dot(d_s.to(query.dtype), query, d_key)
    store_gradient(
        grad_k + head * ah, at, d_key * scale, key, near, near < end, scales + heads + head, 2 * heads, begin, cos, sin,
        N, DH, TURNED,
    )  # fmt: skip
    if TURNED:
        d_value *= tl.load(norms + near, mask=near < end, other=0.0)[:, None]
    tl.store(grad_v + far * at + head * ah + places, d_value.to(grad_v.dtype.element_ty), mask=there)


def options_of(head_dim: int, window: int, cap: float) -> dict[str, Any]:
    return {"DH": head_dim, "WINDOW": window > 0, "CAPPED": cap > 0}


def strides(*tensors: Tensor) -> list[int]:
    """Of tokens and heads; places of a head lie side by side."""
    found = []
    for tensor in tensors:
        assert tensor.stride(2) == 1
        found += [tensor.stride(0), tensor.stride(1)]
    return found


@torch.library.custom_op("plmsae::packed_attention", mutates_args=())
def packed_attention(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, window: int, cap: float) -> tuple[Tensor, Tensor]:
    """(out [T, H, Dh], log2 of the sums of exponentials [H, T], float32). `window`, `cap`: 0 for none."""
    return forward(*(x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v)), tiles, window, cap)


def forward(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, window: int, cap: float) -> tuple[Tensor, Tensor]:
    """As `packed_attention`; places of a head lie side by side."""
    num_tokens, heads, width = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(heads, num_tokens, dtype=torch.float32)
    columns, warps, stages = _shape(_FORWARD, q)
    with torch.cuda.device_of(q):  # Triton launches on the current one
        _forward[len(tiles), heads](
            q, k, v, out, lse, tiles, *strides(q, k, v, out), num_tokens, width**-0.5, cap, window,
            M=TILE, N=columns, num_warps=warps, num_stages=stages, **options_of(width, window, cap),
        )  # fmt: skip
    return out, lse


@packed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, window: int, cap: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("plmsae::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor, window: int, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, [T, H, Dh] each."""
    grad, q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (grad, q, k, v))
    grads = [q.new_empty(q.shape) for _ in range(3)]
    backward(grad, q, k, v, out, lse, tiles, window, cap, grads)
    return grads[0], grads[1], grads[2]


class Turned(NamedTuple):
    """How q and k came to be, and what the gradients of that are to be multiplied with."""

    scales_T2H: Tensor
    norm_T: Tensor
    """For the gradients of v."""
    cos: Tensor
    sin: Tensor
    """Rotary tables of positions in a document."""


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor, window: int, cap: float,
    grads: list[Tensor], turned: Turned | None = None,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v, [T, H, Dh] each with the same strides, into `grads`.

    With `turned`, of what became q and k by a norm and a rotation.
    """
    num_tokens, heads, width = q.shape
    delta = torch.empty_like(lse)
    options = options_of(width, window, cap) | {"TURNED": turned is not None}
    scales, norms, cos, sin = turned or (lse, lse, lse, lse)
    numbers = num_tokens, width**-0.5, cap, window, heads
    with torch.cuda.device_of(q):
        columns, warps, stages = _shape(_QUERIES, q)
        _backward_queries[len(tiles), heads](
            q, k, v, out, grad, lse, delta, grads[0], scales, cos, sin, tiles,
            *strides(q, k, v, out, grad, grads[0]), *numbers,
            M=TILE, N=columns, num_warps=warps, num_stages=stages, **options,
        )  # fmt: skip
        rows, warps, stages = _shape(_KEYS, q)
        _backward_keys[len(tiles), heads](
            q, k, v, grad, lse, delta, grads[1], grads[2], scales, norms, cos, sin, tiles,
            *strides(q, k, v, grad, grads[1]), *numbers,
            M=rows, N=TILE, num_warps=warps, num_stages=stages, **options,
        )  # fmt: skip


@packed_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor, window: int, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, tiles, ctx.window, ctx.cap = inputs
    ctx.save_for_backward(q, k, v, *output, tiles)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, tiles = ctx.saved_tensors
    return (*packed_attention_backward(grad, q, k, v, out, lse, tiles, ctx.window, ctx.cap), None, None, None)


packed_attention.register_autograd(_gradients, setup_context=_remember)
