"""`embed.layout: bucketed`: a shard's training rows as the shuffle's map file, and what sorting them takes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.store.buckets import bytes_of, write_sorted
from plmsae_cli.store.fs import DamagedError, FileRecord, Store
from plmsae_cli.store.passes import Passes, held_rows, most_sorted
from plmsae_cli.store.permutation import Permutation
from plmsae_cli.store.rowsum import row_sum
from plmsae_cli.store.scan import Scan
from plmsae_cli.store.shard_writer import ShardRows


class SortedWriter:
    """`ShardFiles` of the shuffle: the map file `group`, which holds the training rows sorted by their places."""

    def __init__(self, store: Store, folder: str, passes: Passes, group: int, seed: int, rows: ShardRows) -> None:
        self.row_sum = 0
        self._store, self._folder, self._passes, self._group = store, folder, passes, group
        self._seed, self._rows = seed, rows

    def finish(self) -> list[FileRecord]:
        """Raises DamagedError: what was written is not what lay in memory."""
        rows_RW, start = self._rows.side(False), self._rows.sides[False].offset
        numbers_R = np.arange(start, start + len(rows_RW), dtype=np.int64)
        places_R = Permutation(self._passes.rows, self._seed, domain="shuffle")(numbers_R)
        level = self._passes.levels()[0]
        record, self.row_sum = write_sorted(self._store, self._folder, level, 0, self._group, rows_RW, places_R)
        if self.row_sum != row_sum(bytes_of(rows_RW)):
            raise DamagedError(
                f"{record.name} does not hold the rows that were computed", "the memory is faulty: go on elsewhere"
            )
        self._rows.done()
        return [record]


def training_rows(scan: Scan, ranges: Sequence[Sequence[int]]) -> list[int]:
    """Of each shard."""
    before = scan.rows_before([*(start for start, _ in ranges), scan.num_proteins])
    return [after - own for (own, _), (after, _) in pairwise(before)]


def require_fit(
    experiment: Experiment,
    scan: Scan,
    ranges: Sequence[Sequence[int]],
    row_bytes: int,
    layers: int,
    remote: bool,
    begun: bool,
) -> None:
    """Shards that are to be sorted fit a task's memory, and are not so many that `optimize` reads crumbs.

    Args:
        begun: an earlier start fixed the ranges.

    Raises:
        UserError: they do not; it names the shard size that would.
    """
    embed, shuffle = experiment.embed, experiment.shuffle
    assert embed is not None
    assert shuffle is not None
    memory = int(shuffle.memory)
    held = held_rows(memory, row_bytes) // max(1, layers)
    largest, most = max(training_rows(scan, ranges)), most_sorted(scan.num_rows, row_bytes, memory, remote)
    fixed = "a larger shuffle.memory: the first start has fixed the shards"
    if largest > held:
        shard = 0 if begun else _fitting(scan, held, row_bytes)
        raise UserError(
            f"embed.layout: bucketed sorts {largest:,} rows of {layers} layer(s) at a time, shuffle.memory"
            f" ({memory:,} bytes) holds {held:,} of each",
            f"embed.shard: {shard}B fits" if shard else fixed if begun else "a larger shuffle.memory",
        )
    if len(ranges) > most:
        shard = row_bytes * -(-(scan.num_rows + scan.num_heldout_rows) // most)
        fits = not begun and shard <= held * row_bytes
        raise UserError(
            f"embed.layout: bucketed would leave {len(ranges):,} files, of which a task of optimize reads too little each:"
            f" {most:,} are the most with shuffle.memory of {memory:,} bytes",
            f"embed.shard: {shard}B, or more"
            if fits
            else fixed
            if begun
            else "a larger shuffle.memory and embed.shard, or layout: plain, which shuffles in more passes",
        )


def _fitting(scan: Scan, held: int, row_bytes: int) -> int:
    """Bytes of the shards, of those tried the largest, none of which has more than `held` training rows; 0: there are none."""
    wanted = held
    while wanted > 0:
        if max(training_rows(scan, scan.shard_ranges(wanted))) <= held:
            return wanted * row_bytes
        wanted = wanted * 9 // 10
    return 0
