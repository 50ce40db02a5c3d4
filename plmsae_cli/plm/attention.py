"""Attention within each document of a packed stream: one seam, one kernel for each case, and a plain twin.

Shape letters: T tokens of the pack, S documents, H heads, Dh width of a head.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from itertools import groupby
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Backend = Literal["tiles", "varlen", "sdpa"]
_Function = TypeVar("_Function", bound=Callable[..., object])


def constant(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, which brings all of the compiler: seconds, and 170 MB, to whoever imports this."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def _windows() -> bool:
    """Whether torch's variable-length kernel has windows, as in older releases it has not."""
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters


class Documents(NamedTuple):
    """Where the documents of a packed stream lie. Made once a pack and used by every layer."""

    cu_seqlens: Tensor
    """int32 [S + 1], on the stream's device; begins with 0, ends with T; a repeated value is an empty
    document."""
    max_len: int
    """No document is longer. A compiled model wants it constant from pack to pack."""
    lengths: tuple[int, ...] | None = None
    """Tokens of each document on the host, so that the loop need not ask the device. A compiled model on the
    GPU leaves it out: it is not read there, and would be a new constant in each pack."""
    tiles: Tensor | None = None
    """What `flash.tile_table` makes of `cu_seqlens`, where it is known: once a pack instead of once a layer."""

    def tiled(self, num_tokens: int) -> Documents:
        """With `tiles`, where attention's own kernels are."""
        if self.tiles is not None or not _kernels(self.cu_seqlens.device.type, self.cu_seqlens.device.index):
            return self
        from plmsae_cli.plm.flash import tile_table

        return self._replace(tiles=tile_table(self.cu_seqlens, num_tokens))

    def locate(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """(document of each token [T], position of each token in its document [T]), int64, on the device."""
        places_T = torch.arange(num_tokens, device=self.cu_seqlens.device)
        # right=True steps over empty documents to the one that holds the token.
        document_T = torch.searchsorted(self.cu_seqlens, places_T, right=True) - 1
        return document_T, places_T - self.cu_seqlens[document_T]

    def per_document(self, flags_T: Tensor) -> Tensor:
        """How many tokens of each document are true: [T] to int64 [S], exact, without waiting for the
        device."""
        before = torch.nn.functional.pad(flags_T.cumsum(0), (1, 0))
        return before[self.cu_seqlens.long()].diff()


@cache
def _varlen_capable(device_index: int | None) -> bool:
    return torch.cuda.get_device_capability(device_index) >= (8, 0)


_forgone = False


def forgo_kernels() -> bool:
    """Have this process do without kernels of our own from here on, for models read anew; false if it does already."""
    global _forgone
    before, _forgone = _forgone, True
    return not before


def has_kernels() -> bool:
    """Whether there is anything to compile our own kernels with, as far as this process has found."""
    return find_spec("triton") is not None and not _forgone


@constant
def _kernels(device_type: str, device_index: int | None) -> bool:
    """Whether our own kernels run there."""
    return device_type == "cuda" and _varlen_capable(device_index) and has_kernels()


BLOCK_OPS = True
"""Whether training takes the kernels of `block_ops` where they run; a benchmark measures without."""


@contextmanager
def without_block_ops() -> Iterator[None]:
    """Within, what is not compiled yet trains without them."""
    global BLOCK_OPS
    before, BLOCK_OPS = BLOCK_OPS, False
    try:
        yield
    finally:
        BLOCK_OPS = before


@constant
def has_block_ops(device_type: str, device_index: int | None, brain: bool, num_heads: int, head_dim: int) -> bool:
    """Whether the kernels of `block_ops` run there and for such heads: on the H100 and H200, in bfloat16 (`brain`)."""
    if not (brain and BLOCK_OPS and _kernels(device_type, device_index)):
        return False
    from plmsae_cli.plm.products import fits

    # One of them does not compile for sm100, and none was run there.
    return torch.cuda.get_device_capability(device_index) == (9, 0) and fits(num_heads, head_dim)


@constant
def _backend_name(device_type: str, device_index: int | None, half: bool, head_dim: int) -> str:
    if device_type != "cuda" or not half or head_dim % 8 or head_dim > 256:
        return "sdpa"
    if head_dim in (16, 32, 64, 128) and _kernels(device_type, device_index):
        return "tiles"
    return "varlen" if _varlen_capable(device_index) else "sdpa"


def attention_backend(device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> Backend:
    """The kernels that `attention` uses on a device.

    On CUDA from sm80 on, in fp16 or bf16: `tiles`, our own, for heads 16, 32, 64 or 128 wide, where triton is installed;
    `varlen`, torch's, for other multiples of 8 up to 256. `sdpa`, document by document, everywhere else.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    return cast(Backend, _backend_name(device.type, device.index, half, head_dim))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    lengths: Sequence[int] | None = None,
    tiles: Tensor | None = None,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """softmax(q kᵀ / sqrt(Dh)) v within each document; q, k, v and the result are [T, H, Dh].

    With `window` W a token sees those less than W places away; with `soft_cap` c scores s are c tanh(s / c). Call it as
    `attention(q, k, v, *documents)`. Differentiable; the softmax is computed in fp32 by every kernel. Without `lengths`
    the loop over documents reads `cu_seqlens` back from the device, which waits for it.
    """
    if window is not None and window >= max_len:
        window = None
    backend = attention_backend(q.device, q.dtype, q.shape[-1])
    if backend == "tiles":
        from plmsae_cli.plm.flash import packed_attention, tile_table

        tiles = tile_table(cu_seqlens, len(q)) if tiles is None else tiles
        return cast(Tensor, packed_attention(q, k, v, tiles, window or 0, soft_cap or 0.0)[0])
    if soft_cap is not None and q.is_cuda:
        return _flexible(q, k, v, cu_seqlens, window, soft_cap)
    if backend == "varlen" and soft_cap is None:
        return _varying(q, k, v, cu_seqlens, max_len, window)
    if lengths is None:
        lengths = cast("list[int]", cu_seqlens.diff().tolist())
    return _attention_by_document(q, k, v, lengths, window, soft_cap)


def _varying(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # brings all of the compiler

    # Positional: the keywords changed in torch 2.11, 2.12 and 2.13.
    sizes = (cu_seqlens, cu_seqlens, max_len, max_len)
    if window is None:
        return cast(Tensor, varlen_attn(q, k, v, *sizes))
    if not _windows():
        return _flexible(q, k, v, cu_seqlens, window, None)
    return cast(Tensor, varlen_attn(q, k, v, *sizes, window_size=(window - 1, window - 1)))


def _attention_by_document(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None, soft_cap: float | None
) -> Tensor:
    # Neighbours of equal length share a call: a sorted pack is then a few batches without any padding.
    runs = [(length, len(list(same))) for length, same in groupby(lengths) if length]
    sizes = [length * count for length, count in runs]
    outputs = []
    for (length, count), *qkv in zip(runs, *(torch.split(x, sizes) for x in (q, k, v)), strict=True):
        queries, keys, values = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
        near = None if window is None or window >= length else _band(length, window, q.device)
        if soft_cap is None:
            mixed = scaled_dot_product_attention(queries, keys, values, attn_mask=near)
        else:
            mixed = _capped(queries, keys, values, near, soft_cap)
        outputs.append(mixed.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if outputs else torch.empty_like(v)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Which places see which: bool [length, length]."""
    places = torch.arange(length, device=device)
    return (places[:, None] - places).abs() < window


def _capped(q: Tensor, k: Tensor, v: Tensor, near: Tensor | None, soft_cap: float) -> Tensor:
    """Attention in plain products, [..., L, Dh], with capped scores."""
    scores = (q @ k.mT).float() / math.sqrt(q.shape[-1])
    scores = soft_cap * torch.tanh(scores / soft_cap)
    if near is not None:
        scores = scores.masked_fill(~near, -math.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def _flexible(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None, soft_cap: float | None
) -> Tensor:
    """By torch's compiled flex_attention: slower than the variable-length kernel, but it changes scores."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    num_tokens = len(q)
    document_T = Documents(cu_seqlens, num_tokens).locate(num_tokens)[0]

    def seen(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = document_T[i] == document_T[j]
        return same if window is None else same & ((i - j).abs() < window)

    def capped(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if soft_cap is None else soft_cap * torch.tanh(score / soft_cap)

    mask = create_block_mask(seen, None, None, num_tokens, num_tokens, device=q.device)
    flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    batched = (x.transpose(0, 1)[None] for x in (q, k, v))
    return cast(Tensor, flex(*batched, score_mod=capped, block_mask=mask)[0].transpose(0, 1))


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
