"""Writing one shard of one layer: rows come in any order from any thread, files come out.

The one seam between the model and a storage format: `put` for rows, `finish` for files. R: rows. D: dimensions.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from plmsae_cli.store.activations import ACTS, ROW_OFFSET, Statistics
from plmsae_cli.store.fs import FileRecord, Store, join
from plmsae_cli.store.tensorfile import write_tensors

POOLED = "pooled"
"""Folder of the proteins' means, and there the tensor's name is `mean`."""


class RowSink(Protocol):
    """Takes the rows of one layer of one shard."""

    def put(self, heldout: bool, row: int, rows_RD: torch.Tensor) -> None:
        """Take rows from the global number `row` on of their side of the split: on the host, in the stored dtype, valid
        during the call only. Threads call it for disjoint rows at the same time."""

    def finish(self) -> list[FileRecord]:
        """Every row is there: write the files."""


@dataclass(frozen=True)
class Rows:
    """Where the rows of one side of a shard lie in the numbering of their side."""

    offset: int
    count: int


class Buffers:
    """Host memory lent to shards and taken back: fresh pages cost more than writing to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spare: list[torch.Tensor] = []

    def take(self, rows: int, d: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, d], contents undefined."""
        size = rows * d * dtype.itemsize
        with self._lock:
            fits = [i for i, buffer in enumerate(self._spare) if size <= buffer.numel() <= 2 * size]
            whole = self._spare.pop(min(fits, key=lambda i: self._spare[i].numel())) if fits else None
        if whole is None:
            # Shards differ a little in size: with some to spare a buffer serves the others too.
            whole = torch.empty(size + size // 16, dtype=torch.uint8)
        return whole[:size].view(dtype).view(rows, d)

    def give(self, rows_RD: torch.Tensor) -> None:
        """Take back what `take` gave."""
        base = rows_RD._base
        if base is not None:
            with self._lock:
                self._spare.append(base)

    def clear(self) -> None:
        """Free what is not lent."""
        with self._lock:
            self._spare.clear()


BUFFERS = Buffers()
"""The process's own."""


class ShardWriter:
    """A `RowSink` that writes safetensors: training rows, held-out rows, statistics, and means if asked.

    Files below `folder`: `name`, `heldout/name` (each with the tensor `acts` [R, D] and `metadata`), `statistics/name`,
    and with `proteins` `pooled/name`: `mean` [P, D], float32, of the stored rows of each protein.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        name: str,
        d: int,
        dtype: torch.dtype,
        train: Rows,
        heldout: Rows,
        metadata: Mapping[str, str],
        proteins: Sequence[tuple[bool, int, int]] | None = None,
    ) -> None:
        """`proteins`: held out or not, first row (global) and number of rows of each, in order; None without means."""
        self._store, self._folder, self._name, self._d = store, folder, name, d
        self._metadata, self._proteins = metadata, proteins
        self._sides = (train, heldout)
        self._rows = tuple(BUFFERS.take(side.count, d, dtype) for side in self._sides)

    def put(self, heldout: bool, row: int, rows_RD: torch.Tensor) -> None:
        start = row - self._sides[heldout].offset
        self._rows[heldout][start : start + len(rows_RD)].copy_(rows_RD)

    def finish(self) -> list[FileRecord]:
        files = []
        for side, rows_RD, place in zip(self._sides, self._rows, ((), ("heldout",)), strict=True):
            path = join(self._folder, *place, self._name)
            metadata = {**self._metadata, ROW_OFFSET: str(side.offset)}
            files.append(write_tensors(self._store, path, {ACTS: rows_RD}, metadata))
        statistics = Statistics(self._d)
        statistics.update(self._rows[False])
        files.append(
            write_tensors(self._store, join(self._folder, "statistics", self._name), statistics.to_tensors(), {})
        )
        if self._proteins is not None:
            path = join(self._folder, POOLED, self._name)
            files.append(write_tensors(self._store, path, {"mean": self._means(self._proteins)}, self._metadata))
        for rows_RD in self._rows:
            BUFFERS.give(rows_RD)
        return files

    def _means(self, proteins: Sequence[tuple[bool, int, int]]) -> torch.Tensor:
        mean_PD = torch.empty(len(proteins), self._d)
        for protein, (heldout, row, count) in enumerate(proteins):
            start = row - self._sides[heldout].offset
            mean_PD[protein] = self._rows[heldout][start : start + count].mean(0, dtype=torch.float64)
        return mean_PD
