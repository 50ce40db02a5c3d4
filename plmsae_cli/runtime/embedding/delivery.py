"""Rows on the host, handed to whoever stores them, protein by protein."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from plmsae_cli.runtime.embedding.windows import Piece


class Put(Protocol):
    """Takes rows of one layer and one protein, from its residue `first` on; called from several threads at once."""

    def __call__(self, layer: int, protein: int, first: int, rows_RD: torch.Tensor) -> None:
        """`rows_RD` is on the host, in the stored dtype, and valid during the call only. The same rows may come twice,
        after running out of memory."""


def delivery(put: Put, layer: int, pieces: Sequence[Piece]) -> Callable[[torch.Tensor], None]:
    """What puts the rows of a pass, which follow one another as its pieces do."""

    def deliver(rows_RD: torch.Tensor) -> None:
        at = 0
        for piece in pieces:
            size = piece.last - piece.first
            put(layer, piece.protein, piece.first, rows_RD[at : at + size])
            at += size

    return deliver
