"""What lies between the attentions of ESM-2, as Triton kernels for inference in fp16 and bf16 from sm90 on.

Plain PyTorch moves the stream and the feed-forward's hidden layer through memory more often than it must: these add and
normalise in one reading, rotate in place, and apply GELU before a product's result is first written. All arithmetic is fp32.

Shape letters: T tokens of the pack, D residual width, F width of a product's result, H heads, Dh width of a head.
"""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from plmsae_cli.plm.product_kernels import place_of
from plmsae_cli.plm.products import NEIGHBOURS, multiprocessors
from plmsae_cli.plm.reader import QKV, BlockWeights
from plmsae_cli.plm.rotary import Tables

_ROWS, _COLUMNS, _DEPTH = 128, 256, 64
"""Tile of a product, and how much of the inner dimension it takes at a time."""
_ROTATED = 32
"""Tokens that a program rotates."""
_SHARED_BYTES = 216 << 10
"""What a product with these tiles takes of a multiprocessor."""


def runs_on(device: torch.device) -> bool:
    """Whether a GPU has descriptors of tiles and the shared memory for ours: H100, H200, B200; not those for desks."""
    index = torch.cuda.current_device() if device.index is None else device.index
    shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return torch.cuda.get_device_capability(device) >= (9, 0) and bool(shared >= _SHARED_BYTES)


@triton.jit
def _gelu(x):
    """x Phi(x), Phi(x) - 1/2 by an odd polynomial of degree 21 that meets 1/2 at 4.75; off by less than 6e-6."""
    x = tl.maximum(x, -4.75, propagate_nan=tl.PropagateNan.ALL)  # below, rounding times x would grow without end
    near = tl.minimum(x, 4.75)
    # In the square moved to [-1, 1]: in x itself the terms would cancel at the ends.
    t = near * near * (2.0 / (4.75 * 4.75)) - 1.0
    p = t * 0.001347468467 - 0.003850091016
    p = t * p + 0.004918050487
    p = t * p - 0.007041633595
    p = t * p + 0.01344635431
    p = t * p - 0.02171502076
    p = t * p + 0.03039935045
    p = t * p - 0.04055638984
    p = t * p + 0.05323484167
    p = t * p - 0.07366808504
    p = t * p + 0.1487483084
    return x * (near * p + 0.5)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_gelu(
    x, weight, out, bias, num_rows, width: tl.constexpr, depth: tl.constexpr, programs: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    high, wide = tl.cdiv(num_rows, ROWS), tl.cdiv(width, COLUMNS)
    for tile in tl.range(tl.program_id(0), high * wide, programs, flatten=True):
        row, column = place_of(tile, high, wide, ROWS, COLUMNS, NEIGHBOURS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, depth, DEPTH):  # beyond the edges a descriptor reads zeros
            total = tl.dot(x.load([row, k]), weight.load([column, k]).T, total)
        places = column + tl.arange(0, COLUMNS)
        total += tl.load(bias + places, mask=places < width, other=0.0)[None].to(tl.float32)
        out.store([row, column], _gelu(total).to(out.dtype))


@triton.jit
def _add_norm(
    x, change, weight, bias, total, normed, eps, width: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    start, places = tl.program_id(0).to(tl.int64) * width, tl.arange(0, BLOCK)
    there = places < width
    row = tl.load(x + start + places, mask=there, other=0.0).to(tl.float32)
    row += tl.load(change + start + places, mask=there, other=0.0).to(tl.float32)
    tl.store(total + start + places, row.to(total.dtype.element_ty), mask=there)
    centred = tl.where(there, row - tl.sum(row, 0) / width, 0.0)
    centred *= tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    scale = tl.load(weight + places, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(bias + places, mask=there, other=0.0).to(tl.float32)
    tl.store(normed + start + places, (centred * scale + shift).to(normed.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_tokens"])
def _rotate(
    qkv, cos, sin, position, num_tokens, heads: tl.constexpr, stride: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token, pair = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    there = (token < num_tokens)[:, None] & (pair < HALF)[None]
    angle = tl.load(position + token, mask=token < num_tokens, other=0)[:, None] * HALF + pair[None]
    c, s = tl.load(cos + angle, mask=there, other=0.0), tl.load(sin + angle, mask=there, other=0.0)
    start = qkv + token[:, None].to(tl.int64) * stride + pair[None]
    for head in range(heads):
        first = start + head * 2 * HALF
        a = tl.load(first, mask=there, other=0.0).to(tl.float32)
        b = tl.load(first + HALF, mask=there, other=0.0).to(tl.float32)
        tl.store(first, (a * c - b * s).to(qkv.dtype.element_ty), mask=there)
        tl.store(first + HALF, (b * c + a * s).to(qkv.dtype.element_ty), mask=there)


def linear_gelu(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor) -> Tensor:
    """GELU(x Wᵀ + b) [T, F], with the erf form of GELU to within 6e-6; D and F multiples of 8."""
    (num_rows, depth), width = x_TD.shape, weight_FD.shape[0]
    out_TF = x_TD.new_empty(num_rows, width)
    tiles = triton.cdiv(num_rows, _ROWS) * triton.cdiv(width, _COLUMNS)
    programs = multiprocessors(x_TD)
    x, weight, out = (
        TensorDescriptor.from_tensor(tensor, tile)
        for tensor, tile in (
            (x_TD, [_ROWS, _DEPTH]),
            (weight_FD, [_COLUMNS, _DEPTH]),
            (out_TF, [_ROWS, _COLUMNS]),
        )
    )
    with torch.cuda.device_of(x_TD):  # Triton launches on the current one
        _linear_gelu[(min(programs, tiles),)](
            x, weight, out, bias_F, num_rows, width, depth, programs,
            _ROWS, _COLUMNS, _DEPTH, NEIGHBOURS, num_warps=8, num_stages=3,
        )  # fmt: skip
    return out_TF


def add_norm(
    x_TD: Tensor, change_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(x + change, LayerNorm of that sum), each [T, D]; the sum is rounded once, on its way to memory."""
    total_TD, normed_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
    width = x_TD.shape[1]
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x_TD):
        _add_norm[(len(x_TD),)](
            x_TD, change_TD, weight_D, bias_D, total_TD, normed_TD, eps, width, block,
            num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
    return total_TD, normed_TD


def rotate_(qkv_T3HDh: Tensor, tables: tuple[Tensor, Tensor], position_T: Tensor) -> None:
    """Rotate q and k of [T, 3, H, Dh] where they are; `tables` are cos and sin, fp32 [L, 1, Dh / 2], of each position."""
    num_tokens, _, heads, width = qkv_T3HDh.shape
    half = width // 2
    with torch.cuda.device_of(qkv_T3HDh):
        _rotate[(triton.cdiv(num_tokens, _ROTATED),)](
            qkv_T3HDh, tables[0], tables[1], position_T, num_tokens, 2 * heads, 3 * heads * width, half,
            triton.next_power_of_2(half), _ROTATED, num_warps=4,
        )  # fmt: skip


def project(x_TD: Tensor, block: BlockWeights, tables: Tables, position_T: Tensor, num_heads: int) -> QKV:
    """As `reader.project`."""
    normed_TD = F.layer_norm(x_TD, (x_TD.shape[1],), block.norm_D, block.norm_bias_D)
    return _queries_keys_values(normed_TD, block, tables, position_T, num_heads)


def feed(x_TD: Tensor, mixed_THD: Tensor, block: BlockWeights) -> Tensor:
    """As `reader.feed`."""
    x_TD, change_TD = _feed_forward(x_TD, mixed_THD, block)
    return x_TD + change_TD


def between(
    x_TD: Tensor,
    mixed_THD: Tensor,
    block: BlockWeights,
    following: BlockWeights,
    tables: Tables,
    position_T: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reader.between`."""
    x_TD, change_TD = _feed_forward(x_TD, mixed_THD, block)
    x_TD, normed_TD = add_norm(x_TD, change_TD, following.norm_D, following.norm_bias_D)
    return (x_TD, *_queries_keys_values(normed_TD, following, tables, position_T, num_heads))


def _feed_forward(x_TD: Tensor, mixed_THD: Tensor, block: BlockWeights) -> tuple[Tensor, Tensor]:
    """The stream before the feed-forward layer, and what that adds."""
    change_TD = F.linear(mixed_THD.flatten(1), block.out_DD, block.out_bias_D)
    x_TD, normed_TD = add_norm(x_TD, change_TD, block.ffn_norm_D, block.ffn_norm_bias_D)
    hidden_TF = linear_gelu(normed_TD, block.fc1_FD, block.fc1_bias_F)
    return x_TD, F.linear(hidden_TF, block.fc2_DF, block.fc2_bias_D)


def _queries_keys_values(
    normed_TD: Tensor, block: BlockWeights, tables: Tables, position_T: Tensor, num_heads: int
) -> QKV:
    qkv_T3HDh = F.linear(normed_TD, block.qkv_3DD, block.qkv_bias_3D).view(len(normed_TD), 3, num_heads, -1)
    rotate_(qkv_T3HDh, tables, position_T)
    q, k, v = qkv_T3HDh.unbind(1)
    return q, k, v
