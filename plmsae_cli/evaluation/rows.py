"""Residues of an axis's own proteins as activations and latents, a group of whole proteins at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.evaluation.proteins import piece
from plmsae_cli.runtime.embedding import Embedder
from plmsae_cli.sae.interface import Latents
from plmsae_cli.store.fs import join
from plmsae_cli.store.quantise import CALIBRATION, Quantiser

ENCODE_ROWS = 4096


def group_residues(device: torch.device) -> int:
    """Residues embedded before they are counted."""
    return 65_536 if device.type == "cuda" else 8192


class Rows:
    """Activations of one layer as the dictionary was trained on: the same layer, model and stored type.

    int8 ones are encoded by the dataset's frozen numbers and decoded again; of `weights`, another model, they stay as computed.
    """

    def __init__(
        self, scope: Scope, batch_tokens: str | int, check_stop: Callable[[], None], weights: str | None = None
    ):
        manifest = scope.made()
        self.layer: int = manifest["layer"]
        compute = scope.experiment.embed.compute if scope.experiment.embed is not None else "auto"
        if weights is None:
            self.embedder = Embedder.shared(scope.experiment.model.weights, scope.store, compute)
        else:  # of one use: not to be kept beside the model itself
            self.embedder = Embedder(weights, scope.store, compute)
        self.device = self.embedder.device
        quantised = manifest["dtype"] == "int8"
        self._handed: str = self.embedder.compute if quantised else manifest["dtype"]
        self._quantiser: Quantiser | None = None
        if quantised and weights is None:
            self._quantiser = Quantiser.read(scope.store, join(scope.dataset, CALIBRATION)).to(self.device)
        self._batch_tokens = batch_tokens
        self._check_stop = check_stop

    def of(self, sequences: Sequence[str]) -> Tensor:
        """Activations [R, D], float32 on the device, of all residues of the proteins in their order."""
        nothing: Callable[..., Any] = lambda *_, **__: None  # noqa: E731
        kept = self.embedder.run(
            sequences,
            [self.layer],
            [False] * len(sequences),
            self._handed,
            self._batch_tokens,
            nothing,
            self._check_stop,
        )
        rows_RD = kept[self.layer][0].to(self.device)
        return rows_RD.float() if self._quantiser is None else self._quantiser.decode(self._quantiser.encode(rows_RD))

    def activations(
        self,
        sequences: Sequence[str],
        progress: Callable[[float, float], None] = lambda *_: None,
        index: int = 0,
        of: int = 1,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Places of consecutive proteins and the rows of their residues, a group of piece `index` of `of` after the other."""
        batches = piece([len(sequence) for sequence in sequences], group_residues(self.device), index, of)
        for done, places in enumerate(batches):
            self._check_stop()
            yield places, self.of([sequences[p] for p in places])
            progress(done + 1, len(batches))

    def encoded(
        self,
        code: Any,
        sequences: Sequence[str],
        progress: Callable[[float, float], None] = lambda *_: None,
        index: int = 0,
        of: int = 1,
    ) -> Iterator[tuple[list[int], Latents]]:
        """The same with the latents of the residues."""
        for places, x_RD in self.activations(sequences, progress, index, of):
            yield places, encode_rows(code, x_RD)


@torch.inference_mode()
def encode_rows(code: Any, x_RD: Tensor) -> Latents:
    """Latents of many rows, encoded a few thousand at a time; padded to the largest number of active ones."""
    parts = [code.encode(x_BD) for x_BD in torch.split(x_RD, ENCODE_ROWS)]
    width = max(part.acts_BK.shape[1] for part in parts)
    acts = [torch.nn.functional.pad(part.acts_BK.float(), (0, width - part.acts_BK.shape[1])) for part in parts]
    index = [torch.nn.functional.pad(part.indices_BK, (0, width - part.indices_BK.shape[1])) for part in parts]
    return Latents(torch.cat(acts), torch.cat(index))
