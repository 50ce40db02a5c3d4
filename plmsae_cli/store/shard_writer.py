"""Writing one shard of one layer: rows come in any order from any thread, files come out.

The one seam between the model and a storage format: `ShardRows.put` for rows, `ShardFiles.finish` for files; a `Coding` says
how a row lies on the disk. R: rows. D: dimensions. W: numbers of a stored row.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from plmsae_cli.store.activations import ACTS, ROW_OFFSET, Statistics
from plmsae_cli.store.buckets import bytes_of
from plmsae_cli.store.fs import FileRecord, Store, join
from plmsae_cli.store.memory import BUFFERS
from plmsae_cli.store.quantise import CALIBRATION, Quantiser
from plmsae_cli.store.rowsum import row_sum
from plmsae_cli.store.tensorfile import write_tensors

_PART_ROWS = 65_536
"""Rows decoded, and counted, at a time."""
_COUNTING = ThreadPoolExecutor(4, thread_name_prefix="statistics")
_OF_THREAD = threading.local()
POOLED = "pooled"
"""Folder of the proteins' means, and there the tensor's name is `mean`."""


class ShardFiles(Protocol):
    """Writes what one artifact keeps of a shard's rows."""

    row_sum: int
    """Checksum of the training rows, once they are written (`store.rowsum`)."""

    def finish(self) -> list[FileRecord]:
        """Every row is there: write the files."""


class Coding(Protocol):
    """Another form of rows than plain numbers. Rows are coded one by one, in any grouping."""

    @property
    def width(self) -> int:
        """Numbers of a stored row."""

    @property
    def dtype(self) -> torch.dtype:
        """Of a stored row."""

    def encode(self, rows_RD: torch.Tensor) -> torch.Tensor:
        """Stored rows [R, W]."""

    def decode(self, rows_RW: torch.Tensor) -> torch.Tensor:
        """Numbers [R, D] again, for statistics."""


@dataclass(frozen=True)
class Plain:
    """Rows as they are."""

    width: int
    dtype: torch.dtype

    def encode(self, rows_RD: torch.Tensor) -> torch.Tensor:
        return rows_RD

    def decode(self, rows_RW: torch.Tensor) -> torch.Tensor:
        return rows_RW


@dataclass(frozen=True)
class Quantised:
    """Rows in eight bits."""

    quantiser: Quantiser

    @property
    def width(self) -> int:
        return self.quantiser.width

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8

    def encode(self, rows_RD: torch.Tensor) -> torch.Tensor:
        return self.quantiser.encode(rows_RD)

    def decode(self, rows_RW: torch.Tensor) -> torch.Tensor:
        return self.quantiser.to(rows_RW.device).decode(rows_RW)


def coding_of(store: Store, folder: str, dtype: str, d: int) -> Coding:
    """How `embed.dtype` lays down rows of `d` numbers; int8 by the calibration in `folder`."""
    if dtype == "int8":
        return Quantised(Quantiser.read(store, join(folder, CALIBRATION)))
    return Plain(d, getattr(torch, dtype))


@dataclass(frozen=True)
class Rows:
    """Where the rows of one side of a shard lie in the numbering of their side."""

    offset: int
    count: int


class ShardRows:
    """The rows of one layer of one shard, coded, in host memory until all of `readers` have done with them."""

    def __init__(self, coding: Coding, train: Rows, heldout: Rows, readers: int = 1) -> None:
        self.coding = coding
        self.sides = (train, heldout)
        row_bytes = coding.width * coding.dtype.itemsize
        sizes = [side.count * row_bytes for side in self.sides]
        self._buffers = [BUFFERS.take(size) for size in sizes]
        self._rows = [
            buffer[:size].view(coding.dtype).view(-1, coding.width)
            for buffer, size in zip(self._buffers, sizes, strict=True)
        ]
        self._readers = readers
        self._lock = threading.Lock()

    def put(self, heldout: bool, row: int, rows_RD: torch.Tensor) -> None:
        """Take rows from the global number `row` on of their side of the split: on the host, in the stored dtype, valid
        during the call only. Threads call it for disjoint rows at the same time."""
        start = row - self.sides[heldout].offset
        self._rows[heldout][start : start + len(rows_RD)].copy_(self.coding.encode(rows_RD))

    def side(self, heldout: bool) -> torch.Tensor:
        """Stored rows [R, W] of one side of the split."""
        return self._rows[heldout]

    def done(self) -> None:
        """One reader needs them no more."""
        with self._lock:
            self._readers -= 1
            if self._readers == 0:
                for buffer in self._buffers:
                    BUFFERS.give(buffer)


def _own_stream(device: torch.device) -> torch.cuda.Stream | None:
    """This thread's: the default one has passes of the model queued for seconds; none on a CPU.

    The same at every call: the allocator keeps memory by stream, and torch has 32 of them.
    """
    if device.type != "cuda":
        return None
    streams: dict[torch.device, torch.cuda.Stream] = _OF_THREAD.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return streams[device]


class ShardWriter:
    """`ShardFiles` of the activations: training rows, held-out rows, statistics, and means if asked.

    Files below `folder`: `name`, `heldout/name` (each with the tensor `acts` [R, W] and `metadata`), `statistics/name`,
    and with `proteins` `pooled/name`: `mean` [P, D], float32, of the stored rows of each protein.
    """

    def __init__(
        self,
        store: Store,
        folder: str,
        name: str,
        d: int,
        rows: ShardRows,
        metadata: Mapping[str, str],
        proteins: Sequence[tuple[bool, int, int]] | None = None,
        device: torch.device | str = "cpu",
        kept: int | None = None,
    ) -> None:
        """`proteins`: held out or not, first row (global) and number of rows of each, in order; None without means.
        `device`: where statistics are taken. `kept`: of the training rows only those before this global number are written,
        and no file where there are none; None: all.
        """
        self.row_sum = 0
        self._device = torch.device(device)
        self._store, self._folder, self._name, self._d = store, folder, name, d
        self._rows, self._metadata, self._proteins, self._kept = rows, metadata, proteins, kept

    def finish(self) -> list[FileRecord]:
        # Beside the writing: over a gigabyte of bfloat16 statistics take as long as the disk. Parts of a fixed size, merged
        # in order, so that the threads change no bit.
        train_RW = self._rows.side(False)
        checksum = _COUNTING.submit(row_sum, bytes_of(train_RW))
        parts = [_COUNTING.submit(self._statistics_of, part) for part in torch.split(train_RW, _PART_ROWS)]
        files = []
        for heldout, place in ((False, ()), (True, ("heldout",))):
            side, rows_RW = self._rows.sides[heldout], self._rows.side(heldout)
            if not heldout and self._kept is not None:
                rows_RW = rows_RW[: max(0, self._kept - side.offset)]
                if len(rows_RW) == 0:
                    continue
            path = join(self._folder, *place, self._name)
            metadata = {**self._metadata, ROW_OFFSET: str(side.offset)}
            files.append(write_tensors(self._store, path, {ACTS: rows_RW}, metadata))
        statistics = Statistics(self._d)
        for part in parts:
            statistics.merge(part.result())
        files.append(
            write_tensors(self._store, join(self._folder, "statistics", self._name), statistics.to_tensors(), {})
        )
        if self._proteins is not None:
            path = join(self._folder, POOLED, self._name)
            files.append(write_tensors(self._store, path, {"mean": self._means(self._proteins)}, self._metadata))
        self.row_sum = checksum.result()
        self._rows.done()
        return files

    def _statistics_of(self, rows_RW: torch.Tensor) -> Statistics:
        statistics = Statistics(self._d)
        with torch.cuda.stream(_own_stream(self._device)):  # None: no effect
            there = Statistics(self._d, self._device)
            there.update(self._rows.coding.decode(rows_RW.to(self._device)))
            statistics.merge(there)
        return statistics

    def _means(self, proteins: Sequence[tuple[bool, int, int]]) -> torch.Tensor:
        mean_PD = torch.empty(len(proteins), self._d)
        for protein, (heldout, row, count) in enumerate(proteins):
            start = row - self._rows.sides[heldout].offset
            rows_RW = self._rows.side(heldout)[start : start + count]
            mean_PD[protein] = self._rows.coding.decode(rows_RW).mean(0, dtype=torch.float64)
        return mean_PD
