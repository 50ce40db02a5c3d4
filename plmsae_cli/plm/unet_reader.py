"""Reading layers of a UNet at the speed of the device, as `Reader` reads those of ESM-2.

Cut between the attentions in the same way: what lies between two of them (output projection, feed-forward layer, skip, the
mixing in of x0, q, k, v and their rotation) is one graph, which all blocks of a half share; attention is called as it is.
Shape letters: T tokens of the pack, D residual width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from plmsae_cli.plm.attention import Documents, attention
from plmsae_cli.plm.gradients import lookup, scaled
from plmsae_cli.plm.reader import compile_each, deepest, let_vary
from plmsae_cli.plm.rotary import Tables
from plmsae_cli.plm.unet import Block, UNet


class _Pack(NamedTuple):
    """What all blocks of a pass read."""

    tokens_T: Tensor
    x0_TD: Tensor
    rope: Tables


class _Above(NamedTuple):
    """What a block begins with besides the stream."""

    block: Block
    table_VD: Tensor | None
    """Its values' embeddings."""
    skip: tuple[Tensor, Tensor] | None
    """[T, D] of the block that it mirrors, and its weight."""


def enter(x_TD: Tensor, above: _Above, pack: _Pack) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """To a block's attention: the stream, and q, k, v."""
    if above.skip is not None:
        x_TD = x_TD + scaled(*above.skip)
    embedded_TD = None if above.table_VD is None else lookup(above.table_VD, pack.tokens_T)
    return above.block.before(x_TD, pack.x0_TD, embedded_TD, pack.rope)


def between(x_TD: Tensor, mixed_THD: Tensor, block: Block, above: _Above, pack: _Pack) -> tuple[Tensor, ...]:
    """From one block's attention to the next one's: the stream after the block, that within the next, and its q, k, v."""
    x_TD = block.after(x_TD, mixed_THD)
    return (x_TD, *enter(x_TD, above, pack))


def leave(x_TD: Tensor, mixed_THD: Tensor, block: Block) -> Tensor:
    """What follows the last block's attention."""
    return block.after(x_TD, mixed_THD)


class _Steps(NamedTuple):
    enter: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    between: Callable[..., tuple[Tensor, ...]]
    leave: Callable[..., Tensor]


_EAGER = _Steps(enter, between, leave)


class UNetReader:
    """Reads layers of packs with a model that is on its device in its final dtype; shares its parameters."""

    def __init__(self, model: UNet) -> None:
        self.config, self._model = model.config, model
        self._compiled: dict[str | None, _Steps] = {}

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
        """Layer k and its activations [T, D] for each k wanted, ascending; arguments and errors as of `Reader.layers`."""
        model, half = self._model, self.config.num_layers // 2
        num_layers = self.config.num_layers
        last = deepest(wanted, num_layers)
        steps = self._steps(mode) if compiled else _EAGER
        documents = documents.tiled(tokens_T.shape[0])
        rope = model.rotary(documents.locate(tokens_T.shape[0])[1])
        tokens_T = tokens_T.long()
        x_TD = model.embedded(tokens_T, model.embedding_VD.dtype)
        if 0 in wanted:
            yield 0, x_TD
        if last == 0:
            return
        pack, skips = _Pack(tokens_T, x_TD, rope), list[Tensor]()

        def above(i: int) -> _Above:
            table_VD = model.value_tables[min(i, num_layers - 1 - i)] if self.config.mixes_values else None
            mirrored = model.skip_weights is not None and i >= half
            skip = (skips.pop(), cast(Tensor, model.skip_weights)[i - half]) if mirrored else None
            return _Above(cast(Block, model.layers[i]), table_VD, skip)

        def vary(*tensors: Tensor) -> None:
            if compiled and any_length:
                let_vary(*tensors)

        vary(tokens_T, x_TD, *rope)
        x_TD, *qkv = steps.enter(x_TD, above(0), pack)
        for layer in range(1, last + 1):
            block = cast(Block, model.layers[layer - 1])
            mixed_THD = attention(qkv[0], qkv[1], qkv[2], *documents, soft_cap=block.attention.soft_cap)
            qkv.clear()  # their memory is the next region's
            vary(x_TD, mixed_THD)
            if layer == last:
                yield layer, steps.leave(x_TD, mixed_THD, block)
                return
            if model.skip_weights is not None and layer == half:
                # The middle block's own output is the first skip back: it is made, and then added to itself.
                out_TD = steps.leave(x_TD, mixed_THD, block)
                skips.append(out_TD)
                vary(out_TD)
                x_TD, *qkv = steps.enter(out_TD, above(layer), pack)
            else:
                out_TD, x_TD, *qkv = steps.between(x_TD, mixed_THD, block, above(layer), pack)
                if model.skip_weights is not None and layer < half:
                    skips.append(out_TD)
                    vary(out_TD)
            if layer in wanted:
                yield layer, out_TD

    def _steps(self, mode: str | None) -> _Steps:
        if mode not in self._compiled:
            self._compiled[mode] = _Steps(*compile_each(_EAGER, mode))
        return self._compiled[mode]
