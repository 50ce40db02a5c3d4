"""Statistics against numpy's fp64, merged in any grouping; rows read across shards against the matrix."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.config.errors import UserError
from plmsae_cli.store import activations
from plmsae_cli.store.activations import ActivationShards, Statistics
from plmsae_cli.store.fs import FileRecord, Store, StoreError, join
from plmsae_cli.store.manifest import write_manifest
from plmsae_cli.store.tensorfile import write_tensors


def rows(kind: str, count: int = 5000, d: int = 24, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x_BD = torch.randn(count, d, generator=generator, dtype=torch.float64)
    if kind == "mean far larger than the deviation":
        # The narrow types have no numbers that close to each other.
        x_BD = x_BD * (0.01 if dtype.itemsize >= 4 else 20.0) + 1000.0
    if kind == "outlier dimensions":  # as residual streams have
        x_BD[:, 3] = x_BD[:, 3] * 300 - 2000
        x_BD[:, 5] *= 1e-4
    if kind == "drifting":
        x_BD += torch.linspace(-50, 50, count, dtype=torch.float64)[:, None]
    return x_BD.to(dtype)


KINDS = ["plain", "mean far larger than the deviation", "outlier dimensions", "drifting"]


def close(found: Statistics, x_BD: torch.Tensor, tolerance: float = 1e-12) -> None:
    """Equal to numpy's two-pass fp64; the mean's error counts in deviations too, which is harder."""
    x = x_BD.double().numpy()
    deviation = x.std(0)
    assert found.count == len(x)
    assert (np.abs(found.mean_D.numpy() - x.mean(0)) / (np.abs(x.mean(0)) + deviation)).max() < tolerance
    np.testing.assert_allclose(found.variance_D.numpy(), x.var(0), rtol=tolerance)
    assert np.array_equal(found.max_abs_D.numpy(), np.abs(x).max(0))
    np.testing.assert_allclose(found.mean_square_norm, (x**2).sum(1).mean(), rtol=tolerance)
    np.testing.assert_allclose(found.gamma, np.linalg.norm(x.mean(0)) / np.linalg.norm(deviation), rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_against_numpy(kind: str, dtype: torch.dtype) -> None:
    x_BD = rows(kind, dtype=dtype)
    found = Statistics(x_BD.shape[1])
    before = x_BD.clone()
    for batch in x_BD.split(777):
        found.update(batch)
    close(found, x_BD)
    assert torch.equal(x_BD, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_against_numpy_on_cuda(kind: str) -> None:
    x_BD = rows(kind, dtype=torch.bfloat16)
    found, more = Statistics(x_BD.shape[1], "cuda"), Statistics(x_BD.shape[1])
    found.update(x_BD[:4000].cuda())
    more.update(x_BD[4000:])
    found.merge(more)
    close(Statistics.from_tensors(found.to_tensors()), x_BD)


def test_blocks_smaller_than_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(activations._BLOCK_NUMBERS, "cpu", 24 * 17)
    x_BD = rows("outlier dimensions")
    found = Statistics(24)
    found.update(x_BD)
    close(found, x_BD)


@settings(deadline=None, max_examples=60)
@given(
    cuts=st.lists(st.integers(0, 2000), max_size=8),
    kind=st.sampled_from(KINDS),
    tree=st.randoms(use_true_random=False),
)
def test_any_grouping(cuts: list[int], kind: str, tree: object) -> None:
    """Parts, some of them empty, merged pairwise in a random tree (either way round)."""
    x_BD = rows(kind, count=2000, d=6)
    edges = sorted([0, *cuts, 2000])
    parts = []
    for start, stop in pairwise(edges):
        parts.append(Statistics(6))
        parts[-1].update(x_BD[start:stop])
    while len(parts) > 1:
        tree.shuffle(parts)  # type: ignore[attr-defined]
        other = parts.pop()
        parts[-1].merge(other)
    close(parts[0], x_BD)


def test_same_order_same_bytes(tmp_path: Path) -> None:
    x_BD = rows("plain")
    records = []
    for name in "ab":
        found = Statistics(24)
        for batch in x_BD.split(1000):
            part = Statistics(24)
            part.update(batch)
            found.merge(part)
        records.append(found.write(Store(), str(tmp_path / name)))
    assert records[0].xxh3 == records[1].xxh3


@pytest.mark.parametrize("count", [5000, 0])
def test_file_round_trip(tmp_path: Path, count: int) -> None:
    x_BD = rows("outlier dimensions")[:count]
    found = Statistics(24)
    found.update(x_BD)
    path = str(tmp_path / "stats.safetensors")
    found.write(Store(), path)
    again = Statistics.read(Store(), path)
    more_BD = rows("drifting")
    for statistics in (found, again):
        statistics.update(more_BD)
        close(statistics, torch.cat([x_BD, more_BD]))


def test_file_is_readable_by_safetensors(tmp_path: Path) -> None:
    load = pytest.importorskip("safetensors.torch").load_file
    x_BD = rows("plain")
    found = Statistics(24)
    found.update(x_BD)
    found.write(Store(), str(tmp_path / "stats.safetensors"))
    tensors = load(tmp_path / "stats.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "count": (1,), "mean": (24,), "variance": (24,), "mean_square_norm": (1,), "max_abs": (24,),
    }  # fmt: skip
    assert tensors["count"].item() == 5000
    torch.testing.assert_close(tensors["variance"], x_BD.double().var(0, correction=0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_normalisation_makes_unit_mean_square(kind: str) -> None:
    x_BD = rows(kind)
    found = Statistics(24)
    found.update(x_BD)
    mean_D, scale = found.normalisation()
    assert mean_D.dtype == torch.float32
    z_BD = scale * (x_BD - mean_D).double()
    assert z_BD.square().mean().item() == pytest.approx(1.0, rel=1e-4)
    assert z_BD.mean(0).abs().max().item() < 1e-2


@pytest.mark.parametrize("bad", ["none", "equal", "nan", "inf"])
def test_what_cannot_be_normalised(bad: str) -> None:
    found = Statistics(4)
    x_BD = torch.ones(0 if bad == "none" else 10, 4)
    if bad in ("nan", "inf"):
        x_BD[5, 2] = float(bad)
    found.update(x_BD)
    with pytest.raises(UserError, match="cannot be normalised"):
        found.normalisation()


def write_shards(
    folder: str, x_BD: torch.Tensor, sizes: list[int], prefix: str = "", row_offset: int = 0
) -> list[FileRecord]:
    records = []
    row = 0
    for i, size in enumerate(sizes):
        name = f"{prefix}shard-{i:05d}.safetensors"
        part = x_BD[row : row + size]
        written = write_tensors(
            Store(), join(folder, name), {"acts": part}, {"row_offset": str(row_offset + row), "layer": "3"}
        )
        records.append(FileRecord(name, written.size, written.xxh3))
        row += size
    assert row == len(x_BD)
    return records


def finish(folder: str, records: list[FileRecord]) -> None:
    files = [{"name": r.name, "size": r.size, "xxh3": r.xxh3} for r in reversed(records)]
    body = {
        "format": "test/1",
        "stage": "embed",
        "key": "k",
        "config": {},
        "inputs": {},
        "files": files,
        "created": "",
    }
    write_manifest(Store(), folder, body)


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=9), data=st.data())
def test_reading_across_shards(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], data: st.DataObject) -> None:
    folder = str(tmp_path_factory.mktemp("shards"))
    total = sum(sizes)
    x_BD = torch.randn(total, 3).to(torch.bfloat16)
    finish(folder, write_shards(folder, x_BD, sizes))
    shards = ActivationShards(Store(), folder)
    assert (shards.start, shards.stop, shards.d, shards.dtype) == (0, total, 3, torch.bfloat16)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    out_RD = torch.full((stop - start, 3), float("nan"), dtype=torch.bfloat16)
    shards.read_into(start, out_RD)
    assert torch.equal(out_RD, x_BD[start:stop])
    with pytest.raises(ValueError, match=f"has rows 0 to {total}, not"):
        shards.read_into(total, torch.empty(1, 3, dtype=torch.bfloat16))


def test_held_out_rows_have_their_own_numbers(tmp_path: Path) -> None:
    folder = str(tmp_path)
    train_BD, held_BD = torch.randn(20, 3), torch.randn(5, 3)
    records = write_shards(folder, train_BD, [8, 12]) + write_shards(folder, held_BD, [5, 0], "heldout/")
    finish(folder, records)
    out_RD = torch.empty(5, 3)
    ActivationShards(Store(), folder, heldout=True).read_into(0, out_RD)
    assert torch.equal(out_RD, held_BD)
    ActivationShards(Store(), folder).read_into(6, out_RD)
    assert torch.equal(out_RD, train_BD[6:11])


def test_a_range_of_shards_by_name(tmp_path: Path) -> None:
    x_BD = torch.randn(30, 2)
    records = write_shards(str(tmp_path), x_BD, [10, 10, 10])
    shards = ActivationShards(Store(), str(tmp_path), [record.name for record in records[1:]])
    assert (shards.start, shards.stop) == (10, 30)
    out_RD = torch.empty(15, 2)
    shards.read_into(12, out_RD)
    assert torch.equal(out_RD, x_BD[12:27])
    with pytest.raises(ValueError, match="has rows 10 to 30, not 5 to 20"):
        shards.read_into(5, out_RD)


def test_beyond_the_padding_shards_stay_in_order(tmp_path: Path) -> None:
    names = ["shard-99999.safetensors", "shard-100000.safetensors"]
    records = []
    for i, name in enumerate(names):
        acts = torch.full((2, 1), float(i))
        written = write_tensors(Store(), join(str(tmp_path), name), {"acts": acts}, {"row_offset": str(2 * i)})
        records.append(FileRecord(name, written.size, written.xxh3))
    finish(str(tmp_path), records)
    out_RD = torch.empty(4, 1)
    ActivationShards(Store(), str(tmp_path)).read_into(0, out_RD)
    assert out_RD.flatten().tolist() == [0, 0, 1, 1]


def test_few_shards_are_opened(tmp_path: Path) -> None:
    opened: list[str] = []

    class Counting(Store):
        def size(self, path: str) -> int:
            opened.append(path)
            return super().size(path)

    x_BD = torch.arange(400.0).reshape(200, 2)
    finish(str(tmp_path), write_shards(str(tmp_path), x_BD, [1] * 200))
    out_RD = torch.empty(2, 2)
    ActivationShards(Counting(), str(tmp_path)).read_into(123, out_RD)
    assert torch.equal(out_RD, x_BD[123:125])
    assert len(opened) < 16


def test_errors_name_the_file(tmp_path: Path) -> None:
    folder = str(tmp_path)
    x_BD = torch.randn(30, 2)
    records = write_shards(folder, x_BD, [10, 10, 10])
    with pytest.raises(UserError, match="not a finished artifact"):
        ActivationShards(Store(), folder)
    gap = ActivationShards(Store(), folder, [records[0].name, records[2].name])
    with pytest.raises(StoreError, match=r"shard-00000.safetensors ends before row 10"):
        gap.read_into(0, torch.empty(30, 2))
    swapped = ActivationShards(Store(), folder, [records[i].name for i in (1, 0, 2)])
    with pytest.raises(StoreError, match=r"shard-00001.safetensors begins at row 10.*exchanged"):
        swapped.read_into(0, torch.empty(10, 2))
    write_tensors(Store(), join(folder, "other.safetensors"), {"acts": x_BD})
    with pytest.raises(StoreError, match=r"other.safetensors is not a shard of activations"):
        ActivationShards(Store(), folder, ["other.safetensors"]).read_into(0, torch.empty(1, 2))
    none = ActivationShards(Store(), folder, [])
    assert (none.start, none.stop) == (0, 0)
    with pytest.raises(StoreError, match="has no shards"):
        _ = none.d
