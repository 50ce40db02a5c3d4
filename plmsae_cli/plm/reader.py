"""Reading layers of ESM-2 at the speed of the device: no logits, no splices, no gradients.

The same model as `ESM2.forward`, cut between the attentions: what lies between two of them (output projection,
feed-forward layer, the next block's LayerNorm, q, k, v and their rotation) is one function of the weights. On GPUs from
sm90 on it is made of our kernels (`fused`); elsewhere it can be compiled: one compilation serves all blocks, takes seconds,
and fuses across the block's edge. Attention itself is called as it is.
Shape letters: T tokens of the pack, D residual width, F feed-forward width, H heads, Dh width of a head, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from plmsae_cli.plm.attention import Documents, attention, has_kernels
from plmsae_cli.plm.esm2 import ESM2, Block
from plmsae_cli.plm.rotary import Tables, rotate

_EPS = 1e-5
QKV = tuple[Tensor, Tensor, Tensor]


class BlockWeights(NamedTuple):
    """The parameters of one block; those of q, k and v stand in one tensor, so that one product makes all three."""

    norm_D: Tensor
    norm_bias_D: Tensor
    qkv_3DD: Tensor
    qkv_bias_3D: Tensor
    out_DD: Tensor
    out_bias_D: Tensor
    ffn_norm_D: Tensor
    ffn_norm_bias_D: Tensor
    fc1_FD: Tensor
    fc1_bias_F: Tensor
    fc2_DF: Tensor
    fc2_bias_D: Tensor


def block_weights(block: Block) -> BlockWeights:
    """The block's parameters, detached. Afterwards its q, k and v projections are views of the joint tensor."""
    attn = block.self_attn
    projections = (attn.q_proj, attn.k_proj, attn.v_proj)
    joint = []
    for name in ("weight", "bias"):
        parameters = [getattr(projection, name) for projection in projections]
        whole = torch.cat([parameter.detach() for parameter in parameters])
        for parameter, part in zip(parameters, whole.chunk(3), strict=True):
            parameter.data = part
        joint.append(whole)
    others = (attn.out_proj, block.final_layer_norm, block.fc1, block.fc2)
    pairs = [(m.weight.detach(), m.bias.detach()) for m in (block.self_attn_layer_norm, *others)]
    return BlockWeights(*pairs[0], *joint, *(tensor for pair in pairs[1:] for tensor in pair))


def project(x_TD: Tensor, block: BlockWeights, tables: Tables, position_T: Tensor, num_heads: int) -> QKV:
    """What a block's attention takes: q and k rotated, and v, each [T, H, Dh]. `tables` are [L, 1, Dh / 2]."""
    normed_TD = F.layer_norm(x_TD, (x_TD.shape[1],), block.norm_D, block.norm_bias_D, _EPS)
    q, k, v = F.linear(normed_TD, block.qkv_3DD, block.qkv_bias_3D).view(len(x_TD), 3, num_heads, -1).unbind(1)
    cos, sin = tables
    rope = cos[position_T], sin[position_T]
    return rotate(q, rope), rotate(k, rope), v


def feed(x_TD: Tensor, mixed_THD: Tensor, block: BlockWeights) -> Tensor:
    """What follows a block's attention: the residual stream after the block."""
    x_TD = x_TD + F.linear(mixed_THD.flatten(1), block.out_DD, block.out_bias_D)
    normed_TD = F.layer_norm(x_TD, (x_TD.shape[1],), block.ffn_norm_D, block.ffn_norm_bias_D, _EPS)
    hidden_TF = F.gelu(F.linear(normed_TD, block.fc1_FD, block.fc1_bias_F))
    return x_TD + F.linear(hidden_TF, block.fc2_DF, block.fc2_bias_D)


def between(
    x_TD: Tensor,
    mixed_THD: Tensor,
    block: BlockWeights,
    following: BlockWeights,
    tables: Tables,
    position_T: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From one block's attention to the next one's: the stream after the block, and the following q, k, v."""
    x_TD = feed(x_TD, mixed_THD, block)
    return (x_TD, *project(x_TD, following, tables, position_T, num_heads))


class _Steps(NamedTuple):
    project: Callable[..., QKV]
    between: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    feed: Callable[..., Tensor]


_EAGER = _Steps(project, between, feed)


def compile_each(steps: Sequence[Callable[..., Any]], mode: str | None) -> list[Any]:
    """The steps, each compiled whole; `mode` is torch.compile's."""
    return [torch.compile(step, dynamic=False, fullgraph=True, mode=mode) for step in steps]


def deepest(wanted: Sequence[int], num_layers: int) -> int:
    """The last layer wanted. Raises ValueError for layers that the model has not, and where none is wanted."""
    if not wanted or min(wanted) < 0 or max(wanted) > num_layers:
        raise ValueError(f"layers {list(wanted)} asked of a model that has layers 0 to {num_layers}")
    return max(wanted)


def let_vary(*tensors: Tensor) -> None:
    """Have the number of tokens, alone of all dimensions, be an argument of what is compiled for these."""
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0)


def _fused(weight: Tensor) -> _Steps | None:
    """Our kernels, where they run: in half precision, at widths whose rows begin at multiples of 16 bytes."""
    half = weight.dtype in (torch.float16, torch.bfloat16)
    if not (weight.is_cuda and half and weight.shape[-1] % 8 == 0 and has_kernels()):
        return None
    from plmsae_cli.plm import fused

    return _Steps(fused.project, fused.between, fused.feed) if fused.runs_on(weight.device) else None


class Reader:
    """Reads layers of packs with a model that is on its device in its final dtype; shares its parameters."""

    def __init__(self, model: ESM2) -> None:
        self.model = model
        self.config = model.config
        self._blocks = [block_weights(cast(Block, block)) for block in model.layers]
        self._tables: dict[int, Tables] = {}
        self._compiled: dict[str | None, _Steps] = {}
        self._fused = _fused(model.embed_tokens.weight)

    @property
    def fused(self) -> bool:
        """Whether passes run by our kernels, so that there is nothing to compile."""
        return self._fused is not None

    @torch.no_grad()
    def layers(
        self,
        tokens_T: Tensor,
        documents: Documents,
        wanted: Sequence[int],
        *,
        compiled: bool = False,
        mode: str | None = None,
        any_length: bool = False,
    ) -> Iterator[tuple[int, Tensor]]:
        """Layer k and its activations [T, D] for each k wanted, ascending, each as soon as its kernels are queued.

        Blocks above the deepest are not run. With `compiled` the pack must have the same T as those before it, or
        compilation begins anew, unless `any_length` has kernels made that take T as an argument; `mode` is torch.compile's;
        all three say nothing where our kernels run. Documents are as for `ESM2.forward`; layers that the model has not are a
        ValueError.
        """
        num_layers = self.config.num_layers
        last = deepest(wanted, num_layers)
        steps = self._fused or (self._steps(mode) if compiled else _EAGER)
        flexible = compiled and any_length and not self.fused
        documents = documents.tiled(tokens_T.shape[0])
        document_T, position_T = documents.locate(tokens_T.shape[0])
        x_TD = self.model.embed(tokens_T.long(), documents, document_T)
        if 0 in wanted:
            yield 0, x_TD
        if last == 0:
            return
        if flexible:
            let_vary(x_TD, position_T)
        rope = (self._rope(documents.max_len), position_T, self.config.num_heads)
        qkv = list(steps.project(x_TD, self._blocks[0], *rope))
        for layer in range(1, last + 1):
            block = self._blocks[layer - 1]
            mixed_THD = attention(qkv[0], qkv[1], qkv[2], *documents)
            qkv.clear()  # their memory is the next region's
            if flexible:
                let_vary(x_TD, mixed_THD)
            if layer < last:
                x_TD, *qkv = steps.between(x_TD, mixed_THD, block, self._blocks[layer], *rope)
            else:
                x_TD = steps.feed(x_TD, mixed_THD, block)
            if layer in wanted:
                yield layer, self.model.emb_layer_norm_after(x_TD) if layer == num_layers else x_TD

    def _rope(self, max_len: int) -> Tables:
        """cos and sin of positions from 0 to max_len and beyond: gathered by position inside the kernels that rotate."""
        # Powers of two from 1024 on: the table's length is a constant of what is compiled.
        length = 1 << max(10, (max_len - 1).bit_length())
        if length not in self._tables:
            self._tables[length] = self.model.rotary(torch.arange(length, device=self.model.rotary.inv_freq.device))
        return self._tables[length]

    def _steps(self, mode: str | None) -> _Steps:
        if mode not in self._compiled:
            self._compiled[mode] = _Steps(*compile_each(_EAGER, mode))
        return self._compiled[mode]
