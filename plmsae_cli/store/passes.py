"""How a shuffle of any size is divided: passes, tasks, files, bytes and requests. Arithmetic alone, nothing is read.

D bytes of rows go through p passes of tasks that hold M bytes each and read no less than r at a time: D <= M^p / r^(p-1).
The first pass (map) sorts ranges of rows by place, the last (reduce) writes blocks; the passes between them cut the
places into ever finer slices and merge ever more files, so that the last finds segments of r again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

PLACE_BYTES = 8
ROW_OVERHEAD = 4 * PLACE_BYTES
"""Bytes a task holds for a row besides the row: its place, its rank in the order, and what sorting needs."""
RESERVE = 512_000_000
"""Of a task's memory: the interpreter, its libraries, pieces on their way to a file."""
LOCAL_READ, REMOTE_READ = 1_000_000, 4_000_000
"""Bytes of the smallest read that is still efficient, from a disk and from S3."""
TASKS = 64
"""Into as many tasks a pass is divided at least, so that as many workers find work. The same however many there are: nothing
that lies on the disk depends on them."""
LOCAL_TASK, REMOTE_TASK = TASKS * LOCAL_READ, TASKS * REMOTE_READ
"""Bytes of rows below which a task is not divided for that, on a disk and on S3: as many files of this size still hold an
efficient read for each of as many tasks, and what commits a task does not show."""
_WINDOW = 128_000_000
"""Bytes of the smallest window of a reduce, where the memory holds so much."""
MIN_BUCKET_ROWS = 1024
_TABLE = 1 << 20
"""Most entries of a file's table of buckets."""
_GET, _PART = 5 << 20, 16 << 20
"""Bytes of one ranged GET and of one part of an upload, as store/s3.py makes them."""
_OPEN = 2
"""Requests that open a file: its size and its header."""


def usable(memory: int) -> int:
    """Bytes of a task's `memory` that hold rows."""
    return memory - min(memory // 4, RESERVE)


def held_rows(memory: int, row_bytes: int) -> int:
    """Rows a task holds at a time: at least one."""
    return max(1, usable(memory) // (row_bytes + ROW_OVERHEAD))


def task_rows(rows: int, row_bytes: int, memory: int, remote: bool) -> int:
    """Rows of a task of a pass over `rows`: what its memory holds, or fewer where that makes up to `TASKS` tasks."""
    tasks = max(1, min(TASKS, rows * row_bytes // (REMOTE_TASK if remote else LOCAL_TASK)))
    return max(1, min(held_rows(memory, row_bytes), -(-rows // tasks)))


def task_memory(rows: int, row_bytes: int, memory: int) -> int:
    """Bytes that a task of so many rows asks a cluster for: of `memory` no more than they need, so that more fit a machine."""
    return min(memory, memory - usable(memory) + rows * (row_bytes + ROW_OVERHEAD))


def chunks_per_task(rows: int, row_bytes: int, chunk_rows: int, memory: int, remote: bool) -> int:
    """Whole chunks that a task of `optimize` writes: at least one."""
    return max(1, task_rows(rows, row_bytes, memory, remote) // chunk_rows)


def efficient_read(held_bytes: int, remote: bool) -> int:
    """r: what the storage likes, or a 64th of a small memory, so that a merge of 64 files is always possible."""
    return max(1, min(REMOTE_READ if remote else LOCAL_READ, held_bytes // 64))


def window_rows(memory: int, row_bytes: int, files: int) -> int:
    """Rows that a reduce holds at a time from `files` on a disk: what makes efficient reads, if the memory holds so much.

    Memory that is used again is warm; more of it would save nothing.
    """
    wanted = max(_WINDOW, files * 4 * LOCAL_READ) // (row_bytes + ROW_OVERHEAD)
    return max(1, min(held_rows(memory, row_bytes), wanted))


def num_passes(data_bytes: int, held_bytes: int, read_bytes: int) -> int:
    """The smallest p >= 1 with data <= held^p / read^(p-1).

    Published example (external shuffle with 100 GB of memory and files of 1 GB): 100 GB 1, 10 TB 2, 1 PB 3, 100 PB 4.
    """
    assert 0 < read_bytes < held_bytes or data_bytes <= held_bytes, "reads as large as the memory merge nothing"
    passes = 1
    while held_bytes**passes < data_bytes * read_bytes ** (passes - 1):
        passes += 1
    return passes


def ceil_root(value: int, degree: int) -> int:
    """The smallest x with x^degree >= value."""
    root = max(1, round(math.exp(math.log(value) / degree)))
    while root**degree < value:
        root += 1
    while root > 1 and (root - 1) ** degree >= value:
        root -= 1
    return root


def bucket_rows(span_rows: int) -> int:
    """Places of one bucket of a file that spans `span_rows` places: a power of two, so that its table stays small."""
    return max(MIN_BUCKET_ROWS, 1 << (-(-span_rows // _TABLE) - 1).bit_length())


@dataclass(frozen=True)
class Level:
    """The files that a pass leaves: file (slice, group) has the rows of `group` that go to the places of `slice`."""

    number: int
    """0 after map."""
    groups: int
    slices: int
    slice_rows: int
    """Places of every slice but the last."""
    bucket_rows: int
    rows: int

    @property
    def num_files(self) -> int:
        return self.groups * self.slices

    def name(self, part: int, group: int) -> str:
        """The task that makes the file (slice `part`, `group`), and the file's stem."""
        return f"map-{group:05d}" if self.number == 0 else f"merge{self.number}-{part:05d}-{group:05d}"

    def parts(self, start: int, stop: int) -> range:
        """The slices that the places [start, stop) lie in."""
        return range(start // self.slice_rows, -(-stop // self.slice_rows))

    def span(self, part: int) -> tuple[int, int]:
        """Places [start, stop) of slice `part`."""
        return part * self.slice_rows, min((part + 1) * self.slice_rows, self.rows)


@dataclass(frozen=True)
class Passes:
    """A shuffle's shape, fixed by the first start."""

    rows: int
    map_rows: int
    fan: int
    """Files that a middle pass merges, and slices it cuts each slice into; 0 without middle passes."""
    middle: int
    """Passes between map and reduce."""
    first_bucket_rows: int
    maps: int = 0
    """Files of the first pass where `embed` wrote them, one a shard; 0: one for every `map_rows`."""

    def levels(self) -> list[Level]:
        """The files after map and after each middle pass; optimize reads the last."""
        groups, slices = self.maps or -(-self.rows // self.map_rows), 1
        found = [Level(0, groups, 1, self.rows, self.first_bucket_rows, self.rows)]
        for number in range(1, self.middle + 1):
            groups, slices = -(-groups // self.fan), slices * self.fan
            slice_rows = max(1, -(-self.rows // slices))
            fitting = -(-self.rows // slice_rows)
            found.append(Level(number, groups, fitting, slice_rows, bucket_rows(slice_rows), self.rows))
        return found

    @property
    def count(self) -> int:
        """Passes over the data: map, those between, reduce."""
        return 2 + self.middle


def divide(rows: int, row_bytes: int, memory: int, remote: bool) -> Passes:
    """The fewest passes for tasks of this memory."""
    held = held_rows(memory, row_bytes)
    held_bytes = held * row_bytes
    middle = 0
    if rows > held and held > 1:
        middle = max(
            0, num_passes(rows * row_bytes, held_bytes, min(efficient_read(held_bytes, remote), held_bytes // 2)) - 2
        )
    map_rows = task_rows(rows, row_bytes, memory, remote)
    fan = max(2, ceil_root(-(-rows // map_rows), middle + 1)) if middle else 0
    return Passes(rows, map_rows, fan, middle, bucket_rows(rows))


def sorted_shards(shard_rows: Sequence[int]) -> Passes:
    """The shuffle's shape where `embed` sorts its shards, of so many rows each; there are no passes between."""
    rows = sum(shard_rows)
    return Passes(rows, max(1, *shard_rows), 0, 0, bucket_rows(rows), len(shard_rows))


def most_sorted(rows: int, row_bytes: int, memory: int, remote: bool) -> int:
    """Most files that a task of `optimize` reads from without its reads becoming inefficient."""
    held_bytes = held_rows(memory, row_bytes) * row_bytes
    if rows * row_bytes <= held_bytes:
        return rows
    return held_bytes // efficient_read(held_bytes, remote)


@dataclass(frozen=True)
class Effort:
    """What a stage moves."""

    tasks: int
    files: int
    bytes_read: int
    bytes_written: int
    requests: int
    """To an S3 server, if the data are there."""
    temporary_bytes: int = 0
    """On disk at the peak, beyond what the finished artifact takes."""

    def __add__(self, other: Effort) -> Effort:
        """Of two stages after one another."""
        return Effort(
            self.tasks + other.tasks,
            self.files + other.files,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.requests + other.requests,
            max(self.temporary_bytes, other.temporary_bytes),
        )

    def seconds(self, speed: float, machines: int = 1) -> float:
        """At `speed` bytes a second each way, on each machine; the longer way counts, the other hides behind it."""
        return max(self.bytes_read, self.bytes_written) / speed / machines


def shuffle_effort(passes: Passes, row_bytes: int, shard_bytes: int) -> Effort:
    """Map and the middle passes."""
    levels = passes.levels()
    data, placed = passes.rows * row_bytes, passes.rows * (row_bytes + PLACE_BYTES)
    maps = levels[0].groups
    shards = -(-data // shard_bytes)
    requests = (shards + maps) * _OPEN + -(-data // _GET) + puts(maps, placed)
    for before, level in pairwise(levels):
        requests += level.slices * before.groups * (_OPEN + 2) + -(-placed // _GET) + puts(level.num_files, placed)
    merges = sum(level.num_files for level in levels[1:])
    return Effort(
        maps + merges + len(levels),  # a pass that frees the one before it, or the finish
        maps + merges,
        data + passes.middle * placed,
        placed * len(levels),
        requests,
        placed if passes.middle else 0,
    )


def optimize_effort(passes: Passes, row_bytes: int, chunk_rows: int, chunks_per_task: int, memory: int) -> Effort:
    """Reduce: blocks from the last level's files."""
    level = passes.levels()[-1]
    data, placed = passes.rows * row_bytes, passes.rows * (row_bytes + PLACE_BYTES)
    chunks = -(-passes.rows // chunk_rows)
    tasks = -(-chunks // chunks_per_task)
    windows = max(tasks, -(-passes.rows // held_rows(memory, row_bytes)))
    requests = tasks * level.groups * _OPEN + windows * level.groups * 2
    requests += max(windows * level.groups, -(-data // _GET)) + puts(chunks, data)
    return Effort(tasks + 1, chunks, placed, data, requests)


def puts(files: int, data: int) -> int:
    """Requests that upload `files` of `data` bytes together, each read back by its size."""
    return 2 * files + -(-data // _PART)
