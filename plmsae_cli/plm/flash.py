"""Attention within the documents of a packed stream as Triton kernels, forward and backward.

softmax(q kᵀ / sqrt(Dh)) v with a running maximum, or a bound where q and k are normed, scores never stored (Dao et al.,
FlashAttention-2, arXiv 2307.08691). A program (`flash_kernels`) has one tile of a document, or half of one, and one head.
Backward computes the scores twice, once for the gradient of the queries and once for those of keys and values, so that no sum
is atomic and steps repeat bit for bit.

Shape letters: T tokens of the pack, H heads, Dh width of a head, N tiles.
"""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from plmsae_cli.plm import flash_kernels as kernels

TILE: int = kernels.TILE.value
"""Rows of a document in a row of `tile_table`."""


class Shape(NamedTuple):
    """How a kernel runs."""

    own: int
    """Rows that a program has: `TILE` or half of it."""
    block: int
    """Rows of its inner loop."""
    warps: int
    stages: int


class Shapes(NamedTuple):
    """Of the three kernels."""

    forward: Shape
    queries: Shape
    keys: Shape


# By width of a head, the fastest of some ten each on an H200.
SHAPES = {
    64: Shapes(Shape(128, 64, 8, 3), Shape(128, 64, 4, 3), Shape(128, 32, 4, 2)),
    128: Shapes(Shape(128, 64, 4, 2), Shape(128, 64, 8, 3), Shape(128, 64, 8, 2)),
}
DESCRIBED = {
    64: Shapes(Shape(128, 64, 8, 3), Shape(128, 64, 4, 3), Shape(128, 32, 4, 2)),
    128: Shapes(Shape(64, 32, 4, 3), Shape(64, 32, 4, 2), Shape(64, 32, 4, 3)),
}
"""Where inner loops read by descriptors."""
_LEAN = Shapes(*3 * [Shape(128, 32, 8, 2)])
"""Where a multiprocessor has less shared memory than an A100's, and for other widths."""
_SHARED_BYTES = 160 << 10
_MARGIN = 1.02 * math.log2(math.e)
"""Of rounding; scores are in units of log 2."""


@cache
def _ample(device_index: int | None) -> bool:
    index = torch.cuda.current_device() if device_index is None else device_index
    return bool(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"] >= _SHARED_BYTES)


def _shapes(like: Tensor, described: bool) -> Shapes:
    width = like.shape[2]
    known = (DESCRIBED if described else SHAPES).get(width, _LEAN)
    return known if width < 128 or not like.is_cuda or _ample(like.device.index) else _LEAN


def tile_table(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Tiles of all documents, those of the longest first: int32 [N, 3] of first row, document's begin and its end. A document's
    lie in a row, in their order.

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


def _options(shape: Shape, like: Tensor, window: int, cap: float, described: bool) -> dict[str, Any]:
    fixed = {"DH": like.shape[2], "WINDOW": window > 0, "CAPPED": cap > 0, "DESCRIBED": described}
    return fixed | {"M": shape.own, "N": shape.block, "num_warps": shape.warps, "num_stages": shape.stages}


def _inner(tensor: Tensor, shape: Shape, described: bool) -> Any:
    """What an inner loop reads of [T, H, Dh], a head at a time."""
    if not described:
        return tensor
    tokens, heads, width = tensor.shape
    assert tensor.stride()[1:] == (width, 1)
    return TensorDescriptor(tensor, [tokens, heads * width], [tensor.stride(0), 1], [shape.block, width])


def _line(numbers_HT: Tensor, shape: Shape, described: bool) -> Any:
    """As `_inner`, of a number a token and head."""
    return TensorDescriptor.from_tensor(numbers_HT, [1, shape.block]) if described else numbers_HT


def _strides(*tensors: Tensor) -> list[int]:
    """Of tokens and heads; places of a head lie side by side."""
    found = []
    for tensor in tensors:
        assert tensor.stride(2) == 1
        found += [tensor.stride(0), tensor.stride(1)]
    return found


@torch.library.custom_op("plmsae::packed_attention", mutates_args=())
def packed_attention(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, window: int, cap: float) -> tuple[Tensor, Tensor]:
    """(out [T, H, Dh], log2 of the sums of exponentials [H, T], float32). `window`, `cap`: 0 for none."""
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    return forward(q, k, v, tiles, window, cap)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tensor,
    window: int,
    cap: float,
    described: bool = False,
    normed: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `packed_attention`; places of a head lie side by side.

    `described`: inner loops read by descriptors, for GPUs that have them; heads of a token then lie side by side, too, and
    what is not finite in a document makes so what is before it. `normed`: q and k have a mean square of 1 at most, so that no
    score is above sqrt(Dh), which is subtracted instead of a running maximum.
    """
    num_tokens, heads, width = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(heads, num_tokens, dtype=torch.float32)
    shape = _shapes(q, described).forward
    with torch.cuda.device_of(q):  # Triton launches on the current one
        kernels.forward_tiles[len(tiles) * (TILE // shape.own), heads](
            q, _inner(k, shape, described), _inner(v, shape, described), out, lse, tiles, *_strides(q, k, v, out),
            num_tokens, width**-0.5, cap, window, width**0.5 * _MARGIN, BOUNDED=normed,
            **_options(shape, q, window, cap, described),
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
    grads: list[Tensor], turned: Turned | None = None, described: bool = False,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v, [T, H, Dh] each with the same strides, into `grads`.

    With `turned`, of what became q and k by a norm and a rotation. `described`: as in `forward`.
    """
    num_tokens, heads, width = q.shape
    delta = lse.new_empty(heads, len(tiles) * TILE) if described else torch.empty_like(lse)
    levels = torch.empty_like(delta) if described else lse
    scales, norms, cos, sin = turned or (lse, lse, lse, lse)
    numbers = num_tokens, width**-0.5, cap, window, heads
    _, shape, keys = _shapes(q, described)
    assert keys.block <= shape.own
    with torch.cuda.device_of(q):
        kernels.backward_queries[len(tiles) * (TILE // shape.own), heads](
            q, _inner(k, shape, described), _inner(v, shape, described), out, grad, lse, levels, delta, grads[0], scales,
            cos, sin, tiles, *_strides(q, k, v, out, grad, grads[0]), *numbers, TURNED=turned is not None,
            **_options(shape, q, window, cap, described),
        )  # fmt: skip
        kernels.backward_keys[len(tiles) * (TILE // keys.own), heads](
            _inner(q, keys, described), k, v, _inner(grad, keys, described), _line(levels, keys, described),
            _line(delta, keys, described), grads[1], grads[2], scales, norms, cos, sin, tiles,
            *_strides(q, k, v, grad, grads[1]), *numbers, TURNED=turned is not None,
            **_options(keys, q, window, cap, described),
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
