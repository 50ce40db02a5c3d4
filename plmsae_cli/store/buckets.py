"""Files sorted by place: any range of places is one contiguous segment of each file.

R: rows at hand. A row is `width` bytes here, whatever its numbers are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread

import numpy as np
import numpy.typing as npt
import torch

from plmsae_cli.store.fs import FileRecord, Store, StoreError, each, is_remote, join
from plmsae_cli.store.memory import BUFFERS
from plmsae_cli.store.passes import Level
from plmsae_cli.store.rowsum import Bytes2D, row_sum
from plmsae_cli.store.tensorfile import Streamed, TensorFile, write_tensors

Places = npt.NDArray[np.int64]
_PIECE = 1 << 19
"""Bytes gathered at a time: still in a core's cache when they are hashed and written."""


def bytes_of(rows_RD: torch.Tensor) -> Bytes2D:
    """The memory of contiguous rows, [R, width]; numpy has no bfloat16, but any row is bytes."""
    width = rows_RD.shape[1] * rows_RD.element_size()
    view: Bytes2D = rows_RD.detach().view(-1).view(torch.uint8).numpy().reshape(rows_RD.shape[0], width)
    return view


class Ordered:
    """Rows in another order, gathered piece by piece; `sum` is the row checksum of what has gone by."""

    def __init__(self, rows_RD: torch.Tensor, order_R: Places) -> None:
        self.rows_RD = rows_RD
        self._rows_RW, self._order_R = bytes_of(rows_RD), order_R
        self.sum = 0

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        """Rows order[start:stop]; one buffer, done with when the next piece is asked for."""
        width = self._rows_RW.shape[1]
        step = max(1, _PIECE // width)
        piece_RW = np.empty((min(step, max(1, stop - start)), width), np.uint8)
        for first in range(start, stop, step):
            chosen_R = self._order_R[first : min(first + step, stop)]
            filled_RW = piece_RW[: len(chosen_R)]
            # clip: the other modes go through a buffer; every index is in range.
            np.take(self._rows_RW, chosen_R, axis=0, out=filled_RW, mode="clip")
            self.sum ^= row_sum(filled_RW)
            yield filled_RW.reshape(-1).data


def write_sorted(
    store: Store, folder: str, level: Level, part: int, group: int, rows_RD: torch.Tensor, places_R: Places
) -> tuple[FileRecord, int]:
    """Write the file (slice `part`, `group`) of a level; its record and the checksum of its rows."""
    order_R = np.argsort(places_R)  # places are distinct: every sort gives the same order
    sorted_R = places_R[order_R]
    first, last = level.span(part)
    bounds = np.arange(first, last + level.bucket_rows, level.bucket_rows, dtype=np.int64)
    offsets = np.searchsorted(sorted_R, bounds).astype(np.int64)
    ordered = Ordered(rows_RD, order_R)
    rows = Streamed(rows_RD.dtype, tuple(rows_RD.shape), ordered.pieces(0, len(order_R)))
    name = level.name(part, group)
    record = write_tensors(
        store,
        join(folder, f"{name}.safetensors"),
        {"offsets": torch.from_numpy(offsets), "places": torch.from_numpy(sorted_R), "rows": rows},
        {"first_place": str(first), "stop_place": str(last), "bucket_rows": str(level.bucket_rows)},
    )
    return record, ordered.sum


@dataclass(frozen=True)
class _Segment:
    file: TensorFile
    first: int
    places_R: Places


class Buckets:
    """The files of one level of a shuffle, or some groups of them.

    Each file holds `rows` [R, d] sorted by `places` [R] and `offsets` [buckets + 1]: bucket b, the places from
    `first_place` + b * bucket_rows on, is rows [offsets[b], offsets[b + 1]).
    """

    def __init__(self, store: Store, folder: str, level: Level, groups: Sequence[int] | None = None) -> None:
        self._store, self._folder, self._level = store, folder, level
        self._groups = range(level.groups) if groups is None else groups
        self._files: dict[tuple[int, int], TensorFile] = {}
        any_file = self._file((0, self._groups[0]))
        self.d, self.dtype = any_file.shape("rows")[1], any_file.dtype("rows")

    def _file(self, at: tuple[int, int]) -> TensorFile:
        if at not in self._files:
            file = TensorFile(self._store, join(self._folder, f"{self._level.name(*at)}.safetensors"))
            # Until there were middle passes, a map file did not say where its places begin.
            found = file.metadata.get("first_place", "0"), file.metadata.get("bucket_rows")
            wanted = str(self._level.span(at[0])[0]), str(self._level.bucket_rows)
            if found != wanted:
                raise StoreError(
                    f"{file.path} holds other places than its name says (it begins at {found[0]}, not {wanted[0]})",
                    f"it was exchanged for another file: {redo(self._folder)}",
                )
            self._files[at] = file
        return self._files[at]

    def load(self, start: int, stop: int) -> tuple[torch.Tensor, Places]:
        """Rows whose places are in [start, stop), as they lie in the files, and their places. The rows are lent by `BUFFERS`."""
        wanted = [(part, group) for part in self._level.parts(start, stop) for group in self._groups]
        segments = [s for s in each(self._folder, lambda at: self._segment(at, start, stop), wanted) if len(s.places_R)]
        ends = np.cumsum([0, *(len(s.places_R) for s in segments)])
        phase = segments[0].file.place("rows", segments[0].first) if segments else 0
        rows_RD = BUFFERS.rows(int(ends[-1]), self.d, self.dtype, phase)

        def read(i: int) -> None:
            segment = segments[i]
            segment.file.read_into("rows", rows_RD[ends[i] : ends[i + 1]], segment.first)

        each(self._folder, read, range(len(segments)))
        return rows_RD, np.concatenate([np.empty(0, np.int64), *(s.places_R for s in segments)])

    def window(self, start: int, stop: int) -> Ordered:
        """All rows of the places [start, stop), in their order.

        Raises:
            StoreError: the files do not hold each of these places exactly once.
        """
        rows_RD, places_R = self.load(start, stop)
        order_R = np.full(stop - start, -1, np.int64)
        order_R[places_R - start] = np.arange(len(places_R))
        if len(places_R) != stop - start or (order_R < 0).any():
            there = int((order_R >= 0).sum())
            raise StoreError(
                f"{self._folder}: of the places {start:,} to {stop:,}, {there:,} of {stop - start:,} are there,"
                f" in {len(places_R):,} rows",
                f"a file is damaged or of another shuffle: {redo(self._folder)}",
            )
        return Ordered(rows_RD, order_R)

    def prefetch(self, start: int, stop: int) -> None:
        """Begin to read the rows of the places [start, stop), as far as there are any, in the background; from a disk alone."""
        stop = min(stop, self._level.rows)

        def ahead() -> None:
            with suppress(StoreError):  # whoever reads it in earnest will tell
                for at in ((part, group) for part in self._level.parts(start, stop) for group in self._groups):
                    segment = self._segment(at, start, stop)
                    segment.file.prefetch("rows", segment.first, segment.first + len(segment.places_R))

        if not is_remote(self._folder) and start < stop:
            Thread(target=ahead, daemon=True, name="prefetch").start()

    def _segment(self, at: tuple[int, int], start: int, stop: int) -> _Segment:
        file, size = self._file(at), self._level.bucket_rows
        base, end = self._level.span(at[0])
        first_bucket, last_bucket = (max(start, base) - base) // size, -(-(min(stop, end) - base) // size)
        offsets = file.read("offsets", first_bucket, last_bucket + 1)
        first, last = int(offsets[0]), int(offsets[-1])
        places_R: Places = file.read("places", first, last).numpy()
        low, high = (int(v) for v in np.searchsorted(places_R, [start, stop]))
        chosen_R = places_R[low:high]
        if len(chosen_R) > 1 and not (np.diff(chosen_R) > 0).all():
            raise StoreError(f"{file.path} is damaged: its places do not rise", redo(self._folder))
        return _Segment(file, first + low, chosen_R)


class Windows:
    """The rows from one place to another, in order, of which only `held` are in memory at a time."""

    def __init__(self, buckets: Buckets, stop: int, held: int) -> None:
        self._buckets, self._stop, self._held = buckets, stop, held
        self._begin = self._end = 0
        self._window: Ordered | None = None
        self._gone = 0

    @property
    def sum(self) -> int:
        """Row checksum of what has gone by."""
        return self._gone ^ (0 if self._window is None else self._window.sum)

    def close(self) -> None:
        """Give back the memory of the rows that have gone by."""
        if self._window is not None:
            self._gone = self.sum
            BUFFERS.give(self._window.rows_RD)
            self._window = None

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        """Places [start, stop), which follow on those asked for before."""
        while start < stop:
            if self._window is None or not self._begin <= start < self._end:
                self.close()
                self._begin, self._end = start, min(start + self._held, self._stop)
                self._window = self._buckets.window(self._begin, self._end)
                self._buckets.prefetch(self._end, self._end + self._held)  # also for the task after this one
            end = min(stop, self._end)
            yield from self._window.pieces(start - self._begin, end - self._begin)
            start = end


def redo(folder: str) -> str:
    """The remedy for a damaged file of an artifact."""
    return f"`plmsae verify {folder}` names the damaged file and says how to make it again"
