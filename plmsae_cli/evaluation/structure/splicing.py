"""What ESMFold is shown in place of its language model's layers.

ESMFold predicts a structure from a learned average over all hidden states of ESM-2: the embedding, every block's output, and
the last one after the final LayerNorm. Layers are counted as in `plm.esm2`: k is `hidden_states[k]` of transformers.

    isolated    all states but layer k are zero, and layer k is replaced (what SAEFold reports)
    in_place    layer k is replaced in the average, the other states stay as they were
    propagated  layer k is replaced where it is computed, and all later layers see that
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

Mode = Literal["isolated", "in_place", "propagated"]
Value = Callable[[Tensor], Tensor]
"""Layer k at a protein's residues, float32 [L, D], to what stands there instead."""


@contextmanager
def spliced(trunk: Any, layer: int, mode: Mode, value: Value | None) -> Iterator[None]:
    """While this is open, whoever asks `trunk` (transformers' `EsmModel`) for its hidden states of one protein gets them
    so. `<cls>` and `<eos>` are never replaced; `value` None leaves layer k as it is (and `isolated` zeroes the others)."""
    seen: list[Tensor] = []

    def replaced(x_1TD: Tensor) -> Tensor:
        if value is None:
            return x_1TD
        new_LD = value(x_1TD[0, 1:-1].float()).to(x_1TD.dtype)
        return torch.cat([x_1TD[:, :1], new_LD[None], x_1TD[:, -1:]], dim=1)

    def within(_: Any, __: Any, x_1TD: Tensor) -> Tensor:
        seen.append(replaced(x_1TD))
        return seen[-1]

    def after(_: Any, __: Any, output: Any) -> Any:
        states = list(output["hidden_states"])
        # What transformers records of a replaced layer depends on the order of hooks, so it is set here in any case.
        states[layer] = seen.pop() if mode == "propagated" else replaced(states[layer])
        if mode == "isolated":
            states = [state if k == layer else torch.zeros_like(state) for k, state in enumerate(states)]
        output["hidden_states"] = tuple(states)
        return output

    hooks = [trunk.register_forward_hook(after)]
    if mode == "propagated":
        hooks.append(_where_computed(trunk, layer).register_forward_hook(within))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _where_computed(trunk: Any, layer: int) -> Any:
    """The module whose output is that layer."""
    blocks = trunk.encoder.layer
    if layer == 0:
        return trunk.embeddings
    return trunk.encoder.emb_layer_norm_after if layer == len(blocks) else blocks[layer - 1]
