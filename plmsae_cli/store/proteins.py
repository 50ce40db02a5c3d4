"""`proteins.parquet`: where the proteins of an artifact are, and what they are.

One row a kept protein, in FASTA order; one row group a shard, so that the task that makes a shard reads its
proteins and no others. Columns:
    id, description: from the header
    length: residues in the file
    rows: residues as embedded (int32)
    row_offset: first row, in the numbering of the protein's side of the split (int64)
    split: 'train' or 'heldout'
    truncated: whether rows < length
    sequence: as embedded
Training row r is residue r - row_offset (from 0) of the training protein whose rows contain it, and so are
held-out rows in theirs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from plmsae_cli.store.fasta_index import fasta_sha256
from plmsae_cli.store.fs import Buffer, FileRecord, Store, StoreError
from plmsae_cli.store.kept_proteins import Protein, as_embedded, kept_proteins
from plmsae_cli.store.scan import Policies, Scan, scan
from plmsae_cli.store.split import heldout, split_hash

__all__ = [
    "Policies", "Protein", "Scan", "as_embedded", "fasta_sha256", "heldout", "kept_proteins", "locate",
    "locate_rows", "read_proteins", "scan", "sequences_of", "split_hash", "write_proteins",
    "write_table",
]  # fmt: skip

_BATCH = 4096
"""Proteins read at a time where they are read one after the other."""
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("description", pa.string()),
        ("length", pa.int32()),
        ("rows", pa.int32()),
        ("row_offset", pa.int64()),
        ("split", pa.string()),
        ("truncated", pa.bool_()),
        ("sequence", pa.string()),
    ]
)


def write_proteins(
    store: Store,
    path: str,
    fasta: Path,
    scanned: Scan,
    options: Policies,
    shard_ranges: Sequence[tuple[int, int]],
) -> FileRecord:
    """Write the table, reading the FASTA file once; memory holds one shard's proteins.

    `shard_ranges` are those of `Scan.shard_ranges`: they cover all kept proteins in order. The bytes depend
    only on the arguments and the version of pyarrow. Raises UserError if the file changed since its scan.
    """
    return write_table(store, path, kept_proteins(fasta, scanned, options), scanned, shard_ranges)


def write_table(
    store: Store, path: str, proteins: Iterator[Protein], scanned: Scan, shard_ranges: Sequence[tuple[int, int]]
) -> FileRecord:
    """Write the table of these proteins, which are those of the scan in its order; see `write_proteins`."""
    assert [start for start, _ in shard_ranges] == [0, *(stop for _, stop in shard_ranges[:-1])]
    assert shard_ranges[-1][1] == scanned.num_proteins
    return store.write(path, _parquet(proteins, scanned, shard_ranges))


def _parquet(proteins: Iterator[Protein], scanned: Scan, shard_ranges: Sequence[tuple[int, int]]) -> Iterator[Buffer]:
    """The file's bytes, handed on after each row group."""
    sink = _Sink()
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd", use_dictionary=["split"]) as writer:
        for start, stop in shard_ranges:
            table = _table(list(islice(proteins, stop - start)), scanned, slice(start, stop))
            writer.write_table(table, row_group_size=stop - start)
            yield from sink.take()
    # Asks for one more, which is not there: the end of the file is checked too.
    rest = next(proteins, None)
    assert rest is None
    yield from sink.take()


def _table(proteins: list[Protein], scanned: Scan, part: slice) -> pa.Table:
    columns: dict[str, Any] = {
        "id": [protein.id for protein in proteins],
        "description": [protein.description for protein in proteins],
        "length": [protein.length for protein in proteins],
        "rows": scanned.lengths_P[part],
        "row_offset": scanned.row_offset_P[part],
        "split": np.where(scanned.heldout_P[part], "heldout", "train").tolist(),
        "truncated": scanned.truncated_P[part],
        "sequence": [protein.sequence for protein in proteins],
    }
    return pa.table(columns, schema=SCHEMA)


class _Sink(io.RawIOBase):
    """A file that only remembers what was written since it was last asked."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        return len(self._pieces[-1])

    def take(self) -> list[bytes]:
        pieces, self._pieces = self._pieces, []
        return pieces


def read_proteins(
    store: Store,
    path: str,
    row_group: int | None = None,
    split: str | None = None,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """The table, or of it one shard (`row_group`), one side ('train' or 'heldout'), some columns; in order.

    Only what is asked for is read, from S3 too. A damaged file, or an absent shard, is a StoreError.
    """
    wanted = list(columns) if columns is not None else SCHEMA.names
    needed = wanted if split is None else list(dict.fromkeys([*wanted, "split"]))
    source = pa.PythonFile(_Ranges(store, path), mode="r")
    try:
        with pq.ParquetFile(source) as file:
            if row_group is None:
                table = file.read(columns=needed)
            elif 0 <= row_group < file.num_row_groups:
                table = file.read_row_group(row_group, columns=needed)
            else:
                raise StoreError(f"{path} has {file.num_row_groups} shards, there is no number {row_group}")
    except pa.ArrowException as error:
        raise _unsound(path, error) from error
    if split is not None:
        table = table.filter(pc.equal(table["split"], split))
    return table.select(wanted)


def sequences_of(store: Store, path: str, split: str) -> Iterator[str]:
    """Sequences of one side ('train' or 'heldout') in order, some thousands in memory at a time.

    A damaged file is a StoreError.
    """
    source = pa.PythonFile(_Ranges(store, path), mode="r")
    try:
        with pq.ParquetFile(source, pre_buffer=False) as file:
            for batch in file.iter_batches(_BATCH, columns=["sequence", "split"], use_threads=False):
                yield from batch.filter(pc.equal(batch["split"], split))["sequence"].to_pylist()
    except pa.ArrowException as error:
        raise _unsound(path, error) from error


def _unsound(path: str, error: Exception) -> StoreError:
    return StoreError(
        f"{path} is not a sound Parquet file: {error}", "remove its folder and start again: it is made anew"
    )


class _Ranges(io.RawIOBase):
    """A stored file as Python's file object, read by ranges."""

    def __init__(self, store: Store, path: str) -> None:
        self._store = store
        self._path = path
        self._size = store.size(path)
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self._size - self._place)]
        self._store.read_into(self._path, self._place, view)
        self._place += view.nbytes
        return view.nbytes


def locate_rows(
    table: pa.Table, rows_N: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each row, the index in `table` of its protein, and the residue in it (from 0).

    `table` is all of one side of the split, or of one shard's: `read_proteins(..., split="train")`.
    Rows that are not in it, and a table with both sides, are a ValueError.
    """
    offset_P = table["row_offset"].to_numpy()
    stop_P = offset_P + table["rows"].to_numpy()
    if not np.array_equal(offset_P[1:], stop_P[:-1]):
        raise ValueError('the table is not one run of rows: read it with split="train" or split="heldout"')
    if rows_N.size and (not len(offset_P) or rows_N.min() < offset_P[0] or rows_N.max() >= stop_P[-1]):
        within = f"{offset_P[0]:,} to {stop_P[-1] - 1:,}" if len(offset_P) else "none"
        raise ValueError(f"rows {rows_N.min():,} to {rows_N.max():,} are asked for, the table has {within}")
    protein_N = np.searchsorted(offset_P, rows_N, side="right") - 1
    return protein_N.astype(np.int64), (rows_N - offset_P[protein_N]).astype(np.int64)


def locate(table: pa.Table, row: int) -> tuple[str, int]:
    """The id of the protein that `row` belongs to, and the residue in it (from 0); see `locate_rows`."""
    protein, residue = locate_rows(table, np.array([row]))
    return table["id"][int(protein[0])].as_py(), int(residue[0])
