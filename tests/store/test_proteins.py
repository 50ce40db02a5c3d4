"""proteins.parquet: round trip, one row group a shard, the same bytes each time, and rows traced back."""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.fs import MissingError, Store, StoreError
from plmsae_cli.store.proteins import SCHEMA, Scan, locate, locate_rows, read_proteins, scan, write_proteins

if TYPE_CHECKING:
    from tests.conftest import S3Server


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLMSAE_CACHE", str(tmp_path / "cache"))


@dataclass(frozen=True)
class Options:
    max_length: int = 20
    long: str = "truncate"
    unknown: str = "X"
    duplicates: str = "first"
    empty: str = "skip"
    holdout: float = 0.2


def fasta(path: Path, count: int = 200, seed: int = 0) -> tuple[Path, Scan]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, count).tolist()
    letters = iter(rng.choice(list("ACDEFJ*"), sum(lengths)).tolist())
    with path.open("w") as file:
        for i, length in enumerate(lengths):
            file.write(f">p{i} protein {i} é\n{''.join(islice(letters, length))}\n")
    return path, scan(path, Options())


def test_round_trip(tmp_path: Path) -> None:
    path, found = fasta(tmp_path / "a.fasta")
    ranges = found.shard_ranges(300)
    assert len(ranges) > 5
    target = str(tmp_path / "proteins.parquet")
    record = write_proteins(Store(), target, path, found, Options(), ranges)
    assert Store().hash(target) == record
    with pq.ParquetFile(target) as file:
        assert file.schema_arrow == SCHEMA
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [b - a for a, b in ranges]
        assert file.metadata.row_group(0).column(7).compression == "ZSTD"
    rows = read_proteins(Store(), target).to_pylist()
    text = path.read_text().split(">")[1:]
    assert len(rows) == len(text) == 200
    for i, (row, entry) in enumerate(zip(rows, text, strict=True)):
        header, sequence = entry.strip().split("\n")
        embedded = sequence[:20].replace("J", "X").replace("*", "X")
        assert row == {
            "id": f"p{i}",
            "description": header.split(" ", 1)[1],
            "length": len(sequence),
            "rows": len(embedded),
            "row_offset": found.row_offset_P[i],
            "split": "heldout" if found.heldout_P[i] else "train",
            "truncated": len(sequence) > 20,
            "sequence": embedded,
        }


def test_parts_are_slices_of_the_whole(tmp_path: Path) -> None:
    path, found = fasta(tmp_path / "a.fasta")
    ranges = found.shard_ranges(300)
    target = str(tmp_path / "proteins.parquet")
    write_proteins(Store(), target, path, found, Options(), ranges)
    whole = read_proteins(Store(), target)
    for i, (start, stop) in enumerate(ranges):
        assert read_proteins(Store(), target, row_group=i).equals(whole.slice(start, stop - start))
    for split in ("train", "heldout"):
        part = read_proteins(Store(), target, split=split, columns=["id"])
        assert part.column_names == ["id"]
        expected = [row["id"] for row in whole.to_pylist() if row["split"] == split]
        assert part["id"].to_pylist() == expected
        assert expected


def test_bytes_are_the_same_each_time(tmp_path: Path) -> None:
    path, found = fasta(tmp_path / "a.fasta")
    records = [
        write_proteins(Store(), str(tmp_path / name), path, found, Options(), found.shard_ranges(500)) for name in "ab"
    ]
    assert records[0].xxh3 == records[1].xxh3
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_memory_holds_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces handed to the store before the last row group is even read."""
    path, found = fasta(tmp_path / "a.fasta", count=2000)
    seen: list[int] = []

    class Watching(Store):
        def write(self, path: str, buffers, *, size=None):  # type: ignore[no-untyped-def]
            seen.extend(len(buffer) for buffer in buffers)
            return super().write(path, [b""])

    write_proteins(Watching(), str(tmp_path / "p"), path, found, Options(), found.shard_ranges(2000))
    assert max(seen) < sum(seen) / 3


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    path, found = fasta(tmp_path / "a.fasta")
    path.write_text(path.read_text() + ">more\nMK\n")
    target = tmp_path / "out" / "proteins.parquet"
    with pytest.raises(UserError, match="changed since it was scanned"):
        write_proteins(Store(), str(target), path, found, Options(), found.shard_ranges(300))
    assert Store().list(str(target.parent)) == {}


def test_errors_of_reading(tmp_path: Path) -> None:
    path, found = fasta(tmp_path / "a.fasta")
    target = tmp_path / "proteins.parquet"
    write_proteins(Store(), str(target), path, found, Options(), [(0, 200)])
    with pytest.raises(StoreError, match="has 1 shards, there is no number 1"):
        read_proteins(Store(), str(target), row_group=1)
    target.write_bytes(target.read_bytes()[:-9])
    with pytest.raises(StoreError, match="not a sound Parquet file"):
        read_proteins(Store(), str(target))
    with pytest.raises(MissingError):
        read_proteins(Store(), str(tmp_path / "nowhere.parquet"))


def test_on_s3(tmp_path: Path, s3: S3Server) -> None:
    path, found = fasta(tmp_path / "a.fasta")
    ranges = found.shard_ranges(300)
    local = write_proteins(Store(), str(tmp_path / "p.parquet"), path, found, Options(), ranges)
    remote = write_proteins(s3.store(), s3.url("embed", "p.parquet"), path, found, Options(), ranges)
    assert (remote.size, remote.xxh3) == (local.size, local.xxh3)
    for arguments in ({}, {"row_group": 3}, {"split": "heldout", "columns": ["id", "rows"]}):
        expected = read_proteins(Store(), str(tmp_path / "p.parquet"), **arguments)  # type: ignore[arg-type]
        assert read_proteins(s3.store(), s3.url("embed", "p.parquet"), **arguments).equals(expected)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 60), seed=st.integers(0, 99), split=st.sampled_from(["train", "heldout"]))
def test_locate_by_brute_force(tmp_path_factory: pytest.TempPathFactory, count: int, seed: int, split: str) -> None:
    folder = tmp_path_factory.mktemp("locate")
    path, found = fasta(folder / "a.fasta", count, seed)
    write_proteins(Store(), str(folder / "p"), path, found, Options(), found.shard_ranges(100))
    table = read_proteins(Store(), str(folder / "p"), split=split)
    owners = [(row["id"], residue) for row in table.to_pylist() for residue in range(row["rows"])]
    assert len(owners) == (found.num_rows if split == "train" else found.num_heldout_rows)
    assert [locate(table, row) for row in range(0, len(owners), 7)] == owners[::7]
    protein_N, residue_N = locate_rows(table, np.arange(len(owners)))
    ids = table["id"].to_pylist()
    assert [(ids[p], r) for p, r in zip(protein_N, residue_N, strict=True)] == owners
    for outside in (-1, len(owners)):
        with pytest.raises(ValueError, match="asked for, the table has"):
            locate(table, outside)


def test_locate_in_a_shard_and_not_in_both_sides(tmp_path: Path) -> None:
    path, found = fasta(tmp_path / "a.fasta")
    write_proteins(Store(), str(tmp_path / "p"), path, found, Options(), found.shard_ranges(400))
    whole = read_proteins(Store(), str(tmp_path / "p"), split="train")
    shard = read_proteins(Store(), str(tmp_path / "p"), row_group=2, split="train")
    first = shard["row_offset"][0].as_py()
    assert first > 0
    assert locate(shard, first + 5) == locate(whole, first + 5)
    with pytest.raises(ValueError, match="the table has"):
        locate(shard, first - 1)
    with pytest.raises(ValueError, match="not one run of rows"):
        locate(read_proteins(Store(), str(tmp_path / "p")), 0)


def test_reading_asks_for_a_part_of_the_file(tmp_path: Path) -> None:
    path, found = fasta(tmp_path / "a.fasta", count=20_000)
    target = str(tmp_path / "p")
    size = write_proteins(Store(), target, path, found, Options(), found.shard_ranges(20_000)).size
    read = io.BytesIO()

    class Counting(Store):
        def read_into(self, path: str, start: int, buffer: memoryview) -> None:
            super().read_into(path, start, buffer)
            read.write(buffer)

    read_proteins(Counting(), target, row_group=4)
    assert read.tell() < size / 3
