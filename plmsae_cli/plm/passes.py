"""What the language models have in common: a forward pass that layers can be read from, replaced in and resumed at.

Shape letters: T tokens of the pack, M chosen tokens, D residual width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from plmsae_cli.plm.attention import Documents
from plmsae_cli.plm.rotary import Tables

Splice = Callable[[Tensor], Tensor]


class ESM2Output(NamedTuple):
    hidden: dict[int, Tensor]
    """Layer to [T, D], for the layers asked for; each as it was before its splice."""
    logits: Tensor | None
    """[T, V], or None if not asked for."""


class Partway(NamedTuple):
    """A pass that has come as far as a layer: what is computed once where passes differ above it alone."""

    layer: int
    x_TD: Tensor
    """That layer."""
    tokens_T: Tensor
    """int64."""
    documents: Documents
    rope: Tables
    window: int | None = None
    """As in `attention`."""
    kept: tuple[Tensor, ...] = ()
    """Lower layers that blocks above read, too."""
    tables: tuple[Tensor, ...] = ()
    """Value tables; in the dtype of the arithmetic, but for the kernels of training."""
    position_T: Tensor | None = None
    """int32, of each token in its document, where the kernels of training run; `rope` is of positions then."""


class Layers(nn.Module):
    """A model of `config.num_layers` blocks by its layer 0 (`_begin`), the step from a layer to the next, and its head."""

    config: Any

    def _begin(
        self, tokens_T: Tensor, documents: Documents, rope: Tables | None = None, window: int | None = None
    ) -> Partway:
        raise NotImplementedError

    def _next(self, state: Partway) -> Partway:
        raise NotImplementedError

    def head(self, x_MD: Tensor) -> Tensor:
        """Logits [M, V] of rows of the last layer."""
        raise NotImplementedError

    def below(self, tokens_T: Tensor, documents: Documents, layer: int) -> Partway:
        """The pass up to a layer."""
        state = self._begin(tokens_T, documents)
        while state.layer < layer:
            state = self._next(state)
        return state

    def above(self, state: Partway, x_TD: Tensor) -> Tensor:
        """The last layer [T, D], `x_TD` being in the place of the layer that the pass has come to, for all that blocks above
        read of it."""
        state = state._replace(x_TD=x_TD)
        while state.layer < self.config.num_layers:
            state = self._next(state)
        return state.x_TD

    def _read(
        self,
        tokens_T: Tensor,
        documents: Documents,
        layers: Sequence[int],
        splice: Mapping[int, Splice] | None,
        logits: bool,
        rope: Tables | None = None,
        window: int | None = None,
    ) -> ESM2Output:
        """As `ESM2.forward`."""
        num_layers = self.config.num_layers
        splice = splice or {}
        for k in (*layers, *splice):
            if not 0 <= k <= num_layers:
                raise ValueError(f"layer {k} asked of a model that has layers 0 to {num_layers}")
        if not layers and not logits:
            raise ValueError("nothing asked for: name layers, or set logits=True")
        state = self._begin(tokens_T, documents, rope, window)
        hidden: dict[int, Tensor] = {}
        for k in range((num_layers if logits else max(layers)) + 1):
            if k > 0:
                state = self._next(state)
            if k in layers:
                hidden[k] = state.x_TD
            if k in splice:
                state = state._replace(x_TD=splice[k](state.x_TD))
        return ESM2Output(hidden, self.head(state.x_TD) if logits else None)
