"""Activations on disk: shards of rows, read by their global numbers, and statistics streamed over rows.

B: rows of a batch. D: dimensions of the residual stream. R: rows of a read.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from threading import Thread

import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.fs import FileRecord, Store, StoreError, is_remote, join
from plmsae_cli.store.manifest import read_manifest
from plmsae_cli.store.quantise import CALIBRATION, SCALE_BYTES, Quantiser
from plmsae_cli.store.tensorfile import TensorFile, write_tensors

ACTS = "acts"
"""Name of the tensor in a shard, [rows, D]."""
ROW_OFFSET = "row_offset"
"""Key in a shard's header metadata: the global number of its first row, in decimal."""

_BLOCK_NUMBERS = {"cpu": 1 << 17, "cuda": 1 << 23}
"""Numbers widened to fp64 at a time: what fits a CPU core's cache, or fills a GPU."""


class Statistics:
    """Count, mean, variance and largest magnitude of each dimension, over rows seen one batch at a time.

    All sums are fp64. Each block is centred on its own mean before it is squared, and blocks are merged by
    the pairwise update of Chan, Golub and LeVeque (1983, eq. 2.1), so a mean far larger than the deviation
    costs nothing: results agree with numpy's two-pass fp64 to about 1e-12 (relative), in any order and any
    grouping of the rows. Bytes are equal only for an equal order, which is the caller's.
    """

    def __init__(self, d: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean_D = torch.zeros(d, dtype=torch.float64, device=device)
        self.max_abs_D = torch.zeros_like(self.mean_D)
        self._squares_D = torch.zeros_like(self.mean_D)  # of the deviations from the mean, summed

    @property
    def variance_D(self) -> torch.Tensor:
        """Population variance (divided by the count), fp64; NaN before the first row."""
        return self._squares_D / self.count if self.count else torch.full_like(self._squares_D, math.nan)

    @property
    def mean_square_norm(self) -> float:
        """E ||x||^2."""
        return float((self.variance_D + self.mean_D.square()).sum())

    @property
    def gamma(self) -> float:
        """||mean|| / ||deviation||: how far the cloud of rows is from the origin, in its own sizes."""
        return float(self.mean_D.norm() / self.variance_D.sum().sqrt())

    def update(self, rows_BD: torch.Tensor) -> None:
        """Take in rows of any floating dtype, on the device of the statistics; nothing waits for a GPU."""
        block_rows = max(1, _BLOCK_NUMBERS[self.mean_D.device.type] // rows_BD.shape[1])
        for stored_BD in torch.split(rows_BD, block_rows):
            if len(stored_BD) == 0:
                continue
            block_BD = stored_BD.to(torch.float64, copy=True)
            mean_D = block_BD.mean(0)
            squares_D = block_BD.sub_(mean_D).square_().sum(0)
            self._merge(len(stored_BD), mean_D, squares_D, stored_BD.abs().amax(0).to(torch.float64))

    def merge(self, other: Statistics) -> None:
        """Take in all rows that `other` has seen."""
        device = self.mean_D.device
        self._merge(other.count, other.mean_D.to(device), other._squares_D.to(device), other.max_abs_D.to(device))

    def _merge(self, count: int, mean_D: torch.Tensor, squares_D: torch.Tensor, max_abs_D: torch.Tensor) -> None:
        if count == 0:
            return
        share = count / (self.count + count)
        difference_D = mean_D - self.mean_D
        self.mean_D = self.mean_D + difference_D * share
        self._squares_D = self._squares_D + squares_D + difference_D.square() * (self.count * share)
        self.max_abs_D = torch.maximum(self.max_abs_D, max_abs_D)
        self.count += count

    def normalisation(self) -> tuple[torch.Tensor, float]:
        """Mean (fp32, [D]) and scale s such that s * (x - mean) has a mean square of 1 a dimension.

        s = sqrt(D / (E||x||^2 - ||mean||^2)), the same for all dimensions. Raises UserError where there is
        none: no rows, rows all equal, or NaN or Inf among them.
        """
        total_variance = float(self.variance_D.sum())
        if not (math.isfinite(total_variance) and total_variance > 0):
            raise UserError(
                f"activations cannot be normalised: {self.count:,} rows have a variance of {total_variance}",
                "are there NaN or Inf among them (float16 overflows at 65,504), or are all rows the same?",
            )
        return self.mean_D.to("cpu", torch.float32), math.sqrt(self.mean_D.numel() / total_variance)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """count [1] (int64), mean [D], variance [D], mean_square_norm [1], max_abs [D]; fp64, on the CPU."""
        return {
            "count": torch.tensor([self.count]),
            "mean": self.mean_D.cpu(),
            "variance": self.variance_D.cpu(),
            "mean_square_norm": torch.tensor([self.mean_square_norm], dtype=torch.float64),
            "max_abs": self.max_abs_D.cpu(),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Statistics:
        """The inverse of `to_tensors`, to rounding."""
        statistics = cls(tensors["mean"].numel())
        statistics.count = int(tensors["count"])
        statistics.mean_D = tensors["mean"].clone()
        statistics.max_abs_D = tensors["max_abs"].clone()
        if statistics.count:
            statistics._squares_D = tensors["variance"] * statistics.count
        return statistics

    @classmethod
    def of_shards(cls, store: Store, folder: str, d: int, shards: Iterable[str]) -> Statistics:
        """Those of an artifact from those of its shards, merged in the given order."""
        merged = cls(d)
        for name in shards:
            merged.merge(cls.read(store, join(folder, "statistics", f"{name}.safetensors")))
        return merged

    def write(self, store: Store, path: str) -> FileRecord:
        """Write `stats.safetensors`."""
        return write_tensors(store, path, self.to_tensors())

    @classmethod
    def read(cls, store: Store, path: str) -> Statistics:
        file = TensorFile(store, path)
        return cls.from_tensors({name: file.read(name) for name in file.names()})


class ActivationShards:
    """The activations of one layer on one side of the split, as one matrix of rows [start, stop).

    `names`, relative to `folder`, in row order: by default all `shard-*.safetensors` of the finished
    artifact, or of its `heldout/`, which has a numbering of its own. A shard is a safetensors file with the
    tensor `acts` [rows, D] and the header metadata `row_offset`, its first row, also where it has no rows.
    Shards are opened when first needed: finding a row among many thousands opens a dozen.
    """

    def __init__(self, store: Store, folder: str, names: Sequence[str] | None = None, heldout: bool = False) -> None:
        self._store = store
        self._folder = folder
        self._names = list(names) if names is not None else _shard_names(store, folder, heldout)
        self._files: dict[int, TensorFile] = {}
        self._quantiser: Quantiser | None = None

    @property
    def start(self) -> int:
        """First row; 0 without shards."""
        return self._offset(0) if self._names else 0

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self._end(len(self._names) - 1) if self._names else 0

    @property
    def width(self) -> int:
        """Numbers of a row as stored: d, or d + 2 where rows are int8 with their scale."""
        return self._any().shape(ACTS)[1]

    @property
    def d(self) -> int:
        """Dimensions of a row."""
        return self.width - (SCALE_BYTES if self.dtype == torch.int8 else 0)

    @property
    def dtype(self) -> torch.dtype:
        return self._any().dtype(ACTS)

    def read(self, start: int, stop: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Rows [start, stop) as float32 [R, d] on the device, decoded there where they are quantised."""
        rows_RW = torch.empty(stop - start, self.width, dtype=self.dtype)
        self.read_into(start, rows_RW)
        if rows_RW.dtype != torch.int8:
            return rows_RW.to(device).float()
        if self._quantiser is None or self._quantiser.mean_D.device != torch.device(device):
            self._quantiser = Quantiser.read(self._store, join(self._folder, CALIBRATION)).to(device)
        return self._quantiser.decode(rows_RW.to(device))

    def read_into(self, row_start: int, out_RD: torch.Tensor) -> None:
        """Fill `out_RD` ([R, width], contiguous, on the CPU, the shards' dtype) with the rows from `row_start`, as stored.

        Rows outside [start, stop) are a ValueError; shards that do not follow on one another a StoreError.
        """
        row, row_stop = row_start, row_start + len(out_RD)
        if not self.start <= row <= row_stop <= self.stop:
            self._require_order()
        if not self.start <= row <= row_stop <= self.stop:
            raise ValueError(f"{self._folder} has rows {self.start:,} to {self.stop:,}, not {row:,} to {row_stop:,}")
        while row < row_stop:
            shard = self._shard_of(row)
            stop = min(row_stop, self._end(shard))
            if stop <= row:
                self._require_order()
                raise StoreError(
                    f"{self._path(shard)} ends before row {row:,} and no shard has that row",
                    "a shard is missing; delete MANIFEST.json and start embed again: it makes what is absent",
                )
            part_RD = out_RD[row - row_start : stop - row_start]
            self._file(shard).read_into(ACTS, part_RD, row - self._offset(shard))
            row = stop

    def place(self, row: int) -> int:
        """Where in its file the bytes of a row begin; 0 if there is no such row."""
        if not self.start <= row < self.stop:
            return 0
        shard = self._shard_of(row)
        return self._file(shard).place(ACTS, row - self._offset(shard))

    def prefetch(self, start: int, stop: int) -> None:
        """Begin to read rows [start, stop), as far as there are any, into the page cache, in the background."""
        stop = min(stop, self.stop)

        def ahead() -> None:
            row = start
            with suppress(StoreError):  # whoever reads it in earnest will tell
                while row < stop:
                    shard = self._shard_of(row)
                    first, end = self._offset(shard), min(stop, self._end(shard))
                    if end <= row:
                        return
                    self._file(shard).prefetch(ACTS, row - first, end - first)
                    row = end

        if not is_remote(self._folder) and start < stop:
            Thread(target=ahead, daemon=True, name="prefetch").start()

    def _shard_of(self, row: int) -> int:
        """The last shard that begins at the row or before it: of empty ones and the one after them, that one."""
        return bisect_right(range(len(self._names)), row, key=self._offset) - 1

    def _require_order(self) -> None:
        """Raises StoreError, naming the first shard that begins after the one that should follow it."""
        for shard in range(len(self._names) - 1):
            if self._offset(shard) > self._offset(shard + 1):
                raise StoreError(
                    f"{self._path(shard)} begins at row {self._offset(shard):,}, the shard after it at row"
                    f" {self._offset(shard + 1):,}: one was exchanged for another",
                    f"`plmsae verify {self._folder}` names every such file and says how to make it again",
                )

    def _path(self, shard: int) -> str:
        return join(self._folder, self._names[shard])

    def _file(self, shard: int) -> TensorFile:
        if shard not in self._files:
            file = TensorFile(self._store, self._path(shard))
            if ROW_OFFSET not in file.metadata:
                raise StoreError(f"{file.path} is not a shard of activations: its header has no {ROW_OFFSET}")
            self._files[shard] = file
        return self._files[shard]

    def _any(self) -> TensorFile:
        if not self._names:
            raise StoreError(f"{self._folder} has no shards", "is this the right folder, and `holdout` above 0?")
        return self._file(0)

    def _offset(self, shard: int) -> int:
        return int(self._file(shard).metadata[ROW_OFFSET])

    def _end(self, shard: int) -> int:
        return self._offset(shard) + self._file(shard).shape(ACTS)[0]


def _shard_names(store: Store, folder: str, heldout: bool) -> list[str]:
    manifest = read_manifest(store, folder)
    if manifest is None:
        raise UserError(
            f"{folder} is not a finished artifact: it has no MANIFEST.json", "run its embed stage to the end"
        )
    prefix = "heldout/shard-" if heldout else "shard-"
    names = [file["name"] for file in manifest["files"]]
    chosen = [name for name in names if name.startswith(prefix) and name.endswith(".safetensors")]
    # By number: beyond the padding, longer names come later.
    return sorted(chosen, key=lambda name: (len(name), name))
