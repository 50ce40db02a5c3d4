"""Reading layers of a UNet as `Reader` reads those of ESM-2, by the plain forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from plmsae_cli.plm.attention import Documents
from plmsae_cli.plm.unet import UNet


class UNetReader:
    """Reads layers of packs with a model that is on its device in its final dtype."""

    def __init__(self, model: UNet) -> None:
        self.config, self._model = model.config, model

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
        """Layer k and its activations [T, D] for each k wanted, ascending; nothing is compiled."""
        hidden = self._model(tokens_T, documents, layers=wanted).hidden
        for layer in sorted(hidden):
            yield layer, hidden.pop(layer)
