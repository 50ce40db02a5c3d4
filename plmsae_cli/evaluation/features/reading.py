"""Latents of all residues of one side of the split, from activations on disk, a batch of rows at a time.

Letters: R rows of the side, B rows of a batch, P active pairs (row, latent), N latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plmsae_cli.evaluation.features import layout
from plmsae_cli.evaluation.features.files import share
from plmsae_cli.evaluation.features.source import Where
from plmsae_cli.plm.alphabet import AMINO_ACIDS
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.store.activations import ActivationShards
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.proteins import read_proteins

Ints = npt.NDArray[np.int64]
_BLOCK_SCORES = 1 << 27
_BLOCK_ROWS = 4096
_BATCH_BLOCKS = {"cpu": 2, "cuda": 16}
OTHER = len(AMINO_ACIDS)
"""The number of every residue that is none of the twenty, and of those that are not known."""


def block_rows(num_latents: int) -> int:
    """Rows encoded at once: a power of two, of the width alone. Blocks lie on a grid of these, so that a row's activations
    have the same bits whichever task encodes it."""
    return 1 << max(5, (min(_BLOCK_ROWS, _BLOCK_SCORES // num_latents)).bit_length() - 1)


class Active(NamedTuple):
    """The active latents of consecutive rows; rows ascend."""

    start: int
    """First row of the batch."""
    rows: int
    which_P: Tensor
    """Row within the batch."""
    latent_P: Tensor
    act_P: Tensor
    """float32, above 0."""


class Side:
    """Rows [0, R) of one side: the activations, and whose residue each is."""

    def __init__(self, store: Store, place: Where) -> None:
        self.shards = ActivationShards(store, place.folder, heldout=place.heldout)
        self.rows = self.shards.stop
        self._store = store
        self._path = join(place.folder, "proteins.parquet")
        self._split = "heldout" if place.heldout else "train"

    @cached_property
    def _places(self) -> tuple[Ints, Ints]:
        """First row and residues of each protein whose first residue is on disk."""
        table = read_proteins(self._store, self._path, split=self._split, columns=["row_offset", "rows"])
        offset_P, rows_P = table["row_offset"].to_numpy(), table["rows"].to_numpy().astype(np.int64)
        inside = int(np.searchsorted(offset_P, self.rows))
        # Where only the first rows are kept in order, the last protein may be cut.
        return offset_P[:inside], np.minimum(rows_P[:inside], self.rows - offset_P[:inside])

    @property
    def offset_P(self) -> Ints:
        return self._places[0]

    @property
    def length_P(self) -> Ints:
        return self._places[1]

    @cached_property
    def letter_R(self) -> npt.NDArray[np.uint8]:
        """Number of each row's amino acid; OTHER where the sequence is not known."""
        number = np.full(256, OTHER, dtype=np.uint8)
        number[np.frombuffer(AMINO_ACIDS.encode(), dtype=np.uint8)] = np.arange(len(AMINO_ACIDS))
        letter_R = np.full(self.rows, OTHER, dtype=np.uint8)
        table = read_proteins(self._store, self._path, split=self._split, columns=["sequence"])
        for offset, length, text in zip(self.offset_P, self.length_P, table["sequence"], strict=False):
            codes = np.frombuffer(text.as_py().encode(), dtype=np.uint8)[:length]
            letter_R[offset : offset + len(codes)] = number[codes]
        return letter_R

    def proteins(self, columns: list[str]) -> Any:
        """The side's table, those proteins that are on disk."""
        return read_proteins(self._store, self._path, split=self._split, columns=columns).slice(0, len(self.offset_P))

    def protein_of(self, row_C: Ints) -> Ints:
        """The protein of each row."""
        return (np.searchsorted(self.offset_P, row_C, side="right") - 1).astype(np.int64)

    def beginning_in(self, start: int, stop: int) -> tuple[int, int]:
        """The proteins whose first residue is in rows [start, stop)."""
        low, high = np.searchsorted(self.offset_P, [start, stop])
        return int(low), int(high)

    def rows_of(self, low: int, high: int) -> tuple[int, int]:
        """The rows of proteins [low, high)."""
        if low == high:
            return 0, 0
        return int(self.offset_P[low]), int(self.offset_P[high - 1] + self.length_P[high - 1])

    def about(self, start: int, stop: int) -> About:
        """What is known of rows [start, stop)."""
        row_B = np.arange(start, stop)
        protein_B = self.protein_of(row_B)
        length_B = self.length_P[protein_B]
        place_B = row_B - self.offset_P[protein_B]
        decile_B = place_B * layout.DECILES // length_B
        columns = (protein_B, place_B + 1, self.letter_R[start:stop].astype(np.int64), decile_B, length_B)
        return About(*(torch.from_numpy(column) for column in columns))


class About(NamedTuple):
    """Of consecutive rows, int64: protein, position in it (from 1), amino acid, tenth of the protein, length of it."""

    protein_B: Tensor
    position_B: Tensor
    letter_B: Tensor
    decile_B: Tensor
    length_B: Tensor

    def to(self, device: torch.device) -> About:
        return About(*(column.to(device) for column in self))


class Reader:
    """The dictionary on batches of whole blocks; a batch never reaches beyond `stop`, its blocks do where rows do."""

    def __init__(self, model: Dictionary, side: Side, device: torch.device, check_stop: Callable[[], None]) -> None:
        self.model = model.to(device)
        self.side = side
        self.device = device
        self.block = block_rows(model.num_latents)
        self._check_stop = check_stop

    def blocks(self) -> int:
        """How many blocks cover the side."""
        return -(-self.side.rows // self.block)

    def piece(self, index: int, of: int) -> tuple[int, int]:
        """Rows of piece `index` of `of`: whole blocks."""
        first, last = share(self.blocks(), index, of)
        return first * self.block, min(self.side.rows, last * self.block)

    def batches(self, start: int, stop: int) -> Iterator[Active]:
        """Rows [start, stop), and those before and after them in their blocks; several blocks at a time."""
        step = _BATCH_BLOCKS[self.device.type] * _BLOCK_ROWS
        end = min(self.side.rows, -(-stop // self.block) * self.block)
        for row in range(start // self.block * self.block, end, step):
            self._check_stop()
            yield self.read(row, min(end, row + step))

    @torch.inference_mode()
    def read(self, start: int, stop: int) -> Active:
        """The active pairs of rows [start, stop); start is on the grid, stop is too or is the last row."""
        x_BD = self.side.shards.read(start, stop, self.device)
        self.side.shards.prefetch(stop, stop + len(x_BD))
        parts = []
        for offset in range(0, len(x_BD), self.block):
            latents = self.model.encode(x_BD[offset : offset + self.block])
            parts.append(active_pairs(latents.acts_BK, latents.indices_BK, offset))
        which, latent, act = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return Active(start, len(x_BD), which, latent, act)


def active_pairs(acts_BK: Tensor, indices_BK: Tensor, offset: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Row (counted from `offset`), latent and activation of every pair above 0."""
    acts_P = acts_BK.flatten().float()
    place_P = (acts_P > 0).nonzero().squeeze(1)
    row_B = torch.arange(offset, offset + len(acts_BK), device=acts_P.device)
    which_P = row_B[:, None].expand(acts_BK.shape).flatten().index_select(0, place_P)
    return which_P, indices_BK.flatten().index_select(0, place_P), acts_P.index_select(0, place_P)


def bins_of(act_P: Tensor, maximum_P: Tensor) -> Tensor:
    """Which of the equal bins of activation / maximum, int64; the last where it is larger, or the maximum is 0."""
    share_P = act_P / maximum_P  # infinite over 0
    return ((share_P * layout.HISTOGRAM_BINS).ceil() - 1).clamp(0, layout.HISTOGRAM_BINS - 1).long()
