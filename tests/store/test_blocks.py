"""Blocks are the format that unmodified litdata reads, bit for bit."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.blocks import (
    MAX_CHUNK_BYTES,
    Blocks,
    chunk_name,
    chunk_rows,
    index_json,
    write_chunk,
    write_index,
)
from plmsae_cli.store.fs import FileRecord, Store, StoreError, join

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]
SIZES = [16, 16, 16, 5]
"""Rows a chunk: several, the last one short."""


def random_rows(num_rows: int, d: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of arbitrary bytes, NaNs and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_rows, d * dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype)


def write_blocks(folder: str, rows_RD: torch.Tensor, sizes: list[int]) -> list[FileRecord]:
    store = Store()
    names = [chunk_name(i) for i in range(len(sizes))]
    pieces = rows_RD.split(sizes)
    records = [write_chunk(store, join(folder, name), piece) for name, piece in zip(names, pieces, strict=True)]
    return [*records, write_index(store, folder, names, sizes, rows_RD.shape[1], rows_RD.dtype)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmodified_litdata_reads_every_row(tmp_path: Path, dtype: torch.dtype) -> None:
    from litdata import StreamingDataset, TokensLoader

    d = 6
    rows_RD = random_rows(sum(SIZES), d, dtype)
    write_blocks(str(tmp_path), rows_RD, SIZES)
    dataset = StreamingDataset(str(tmp_path), item_loader=TokensLoader(block_size=d), drop_last=False)
    assert len(dataset) == len(rows_RD)
    assert same_bits(torch.stack(list(dataset)), rows_RD)
    assert same_bits(dataset[len(rows_RD) - 1], rows_RD[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_litdata_batches_are_our_blocks(tmp_path: Path, dtype: torch.dtype) -> None:
    """Where B divides the chunks, item i of block_size = B * d is our rows [i B, (i + 1) B)."""
    from litdata import StreamingDataset, TokensLoader

    d, block_rows = 6, 4
    rows_RD = random_rows(sum(SIZES), d, dtype)
    write_blocks(str(tmp_path), rows_RD, SIZES)
    dataset = StreamingDataset(str(tmp_path), item_loader=TokensLoader(block_size=block_rows * d), drop_last=False)
    blocks = Blocks(Store(), str(tmp_path))
    assert len(dataset) == blocks.num_rows // block_rows == 13
    for i, item in enumerate(dataset):
        ours_BD = blocks.read(i * block_rows, (i + 1) * block_rows)
        assert same_bits(item.view(block_rows, d), ours_BD)
        assert same_bits(ours_BD, rows_RD[i * block_rows : (i + 1) * block_rows])


def test_we_read_what_litdata_writes_into_a_chunk(tmp_path: Path) -> None:
    """litdata's own writer, given one item a chunk, makes the same bytes."""
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    rows_RD = random_rows(8, 6, torch.float16)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    writer = BinaryWriter(str(theirs), chunk_bytes=1 << 20, item_loader=TokensLoader())
    writer[0] = rows_RD.flatten()
    writer.done()
    writer.merge()
    write_blocks(str(ours), rows_RD, [8])
    assert (theirs / "chunk-0-0.bin").read_bytes() == (ours / "chunk-0-0.bin").read_bytes()
    their_index = json.loads((theirs / "index.json").read_bytes())
    our_index = json.loads((ours / "index.json").read_bytes())
    assert their_index["chunks"] == our_index["chunks"]
    same = set(our_index["config"]) - {"chunk_bytes"}
    assert {key: their_index["config"][key] for key in same} == {key: our_index["config"][key] for key in same}


def test_bytes_of_a_chunk(tmp_path: Path) -> None:
    rows_RD = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float32)
    record = write_chunk(Store(), str(tmp_path / "c.bin"), rows_RD)
    content = (tmp_path / "c.bin").read_bytes()
    assert content == struct.pack("<III4f", 1, 12, 28, 1.0, -2.0, 0.5, 3.0)
    assert record.size == len(content) == 28


def test_index_is_pinned() -> None:
    """The same rows make the same bytes at any time: no date, no path."""
    assert json.loads(index_json([("chunk-0-0.bin", 4), ("chunk-0-1.bin", 3)], 2, torch.bfloat16)) == {
        "chunks": [
            {"chunk_bytes": 28, "chunk_size": 1, "dim": 8, "filename": "chunk-0-0.bin"},
            {"chunk_bytes": 24, "chunk_size": 1, "dim": 6, "filename": "chunk-0-1.bin"},
        ],
        "config": {
            "chunk_bytes": 28,
            "chunk_size": None,
            "compression": None,
            "data_format": ["no_header_tensor:10"],
            "data_spec": '[1, {"type": null, "context": null, "children_spec": []}]',
            "encryption": None,
            "item_loader": "TokensLoader",
            "types": "tensor",
        },
        "updated_at": "0",
        "plmsae": {"d": 2},
    }


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_range_across_chunks(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = str(tmp_path_factory.mktemp("blocks"))
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=6))
    dtype = data.draw(st.sampled_from(DTYPES))
    rows_RD = random_rows(sum(sizes), 3, dtype)
    write_blocks(folder, rows_RD, sizes)
    blocks = pickle.loads(pickle.dumps(Blocks(Store(), folder)))  # noqa: S301
    assert (blocks.num_rows, blocks.n, blocks.d, blocks.dtype) == (len(rows_RD), len(rows_RD), 3, dtype)
    start = data.draw(st.integers(0, len(rows_RD)))
    stop = data.draw(st.integers(start, len(rows_RD)))
    assert same_bits(blocks.read(start, stop), rows_RD[start:stop])
    guarded = torch.zeros(stop - start + 2, 3, dtype=dtype)
    blocks.read_into(start, guarded[1:-1])
    assert same_bits(guarded[1:-1], rows_RD[start:stop])
    assert not guarded[[0, -1]].any()


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    write_blocks(str(tmp_path), random_rows(8, 3, torch.int8), [8])
    blocks = Blocks(Store(), str(tmp_path))
    with pytest.raises(UserError, match="has 8 rows, not 6 to 9"):
        blocks.read(6, 9)


def test_missing_and_short_chunks_are_named(tmp_path: Path) -> None:
    write_blocks(str(tmp_path), random_rows(8, 3, torch.float32), [4, 4])
    blocks = Blocks(Store(), str(tmp_path))
    chunk = tmp_path / "chunk-0-1.bin"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    assert blocks.read(0, 7).shape == (7, 3)
    with pytest.raises(StoreError, match=r"chunk-0-1\.bin"):
        blocks.read(0, 8)
    chunk.unlink()
    with pytest.raises(StoreError, match=r"chunk-0-1\.bin"):
        blocks.read(4, 5)


def test_chunk_rows() -> None:
    """The header counts: three blocks need 12 bytes more than three blocks' rows."""
    assert chunk_rows(12 + 3 * 8192 * 2560, 8192, 1280, torch.bfloat16) == 3 * 8192
    assert chunk_rows(11 + 3 * 8192 * 2560, 8192, 1280, torch.bfloat16) == 2 * 8192
    assert chunk_rows(1, 8192, 1280, torch.bfloat16) == 8192
    largest = (MAX_CHUNK_BYTES - 12) // 4
    assert chunk_rows(1, largest, 2, torch.float16) == largest
    with pytest.raises(UserError, match=rf"optimize\.block_rows = {largest + 1} ") as error:
        chunk_rows(1, largest + 1, 2, torch.float16)
    assert str(error.value).endswith(f"at most {largest}")
    with pytest.raises(UserError, match=r"optimize\.chunk = 5000000000"):
        chunk_rows(5_000_000_000, 8192, 1280, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"compression": "zstd"}, "compression 'zstd'"),
        ({"encryption": {"algorithm": "fernet"}}, "encryption {'algorithm': 'fernet'}"),
        ({"item_loader": "PyTreeLoader"}, "item_loader 'PyTreeLoader'"),
        ({"data_format": ["pickle"]}, "data_format ['pickle']"),
        ({"data_format": ["no_header_tensor:18"]}, "data_format ['no_header_tensor:18']"),
        ({"data_format": ["no_header_tensor:1", "int"]}, "data_format ['no_header_tensor:1', 'int']"),
        ({"data_format": ["pickle"], "item_loader": None}, "item_loader None, data_format ['pickle']"),
        ({"data_format": []}, "data_format []"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    write_blocks(str(tmp_path), random_rows(8, 3, torch.float32), [8])
    index = json.loads((tmp_path / "index.json").read_bytes())
    index["config"] |= change
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as error:
        Blocks(Store(), str(tmp_path))
    assert named in error.value.message
    assert str(tmp_path) in error.value.message


def test_foreign_and_damaged_indexes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no index\.json"):
        Blocks(Store(), str(tmp_path))
    path = tmp_path / "index.json"
    good = json.loads(index_json([("chunk-0-0.bin", 8)], 3, torch.float32))
    for damage, message in [
        ("{", "not an index"),
        ("[]", "not an index"),
        ('{"version": 2, "shards": []}', "not an index"),
        (json.dumps({**good, "plmsae": {"d": 0}}), "not an index"),
        (json.dumps({**good, "plmsae": {"d": 5}}), "not a matrix of rows of 5"),
        (json.dumps({k: v for k, v in good.items() if k != "plmsae"}), "how wide a row is"),
        (
            json.dumps({**good, "chunks": [{**good["chunks"][0], "chunk_size": 2}]}),
            "2 items in chunk-0-0.bin",
        ),
        (json.dumps({**good, "chunks": [{**good["chunks"][0], "filename": "../x.bin"}]}), r"\.\./x\.bin"),
    ]:
        path.write_text(damage)
        with pytest.raises(UserError, match=message):
            Blocks(Store(), str(tmp_path))
