"""Foreign activations against the arrays they were written from, and each bad one against its message."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.imports import Source, documents_of, open_source, scan_imported

Rows = npt.NDArray[Any]
D = 6


def matrix(rows: int, seed: int = 0, dtype: str = "<f4") -> Rows:
    return np.random.default_rng(seed).normal(size=(rows, D)).astype(dtype)


def write_npy(folder: Path, parts: list[Rows]) -> None:
    for i, part in enumerate(parts):
        np.save(folder / f"acts-{i + 8}.npy", part)  # 8, 9, 10: not in the order of the letters


def write_fortran(folder: Path, parts: list[Rows]) -> None:
    for i, part in enumerate(parts):
        np.save(folder / f"{i:02d}.npy", np.asfortranarray(part.astype(">f4")))


def write_safetensors(folder: Path, parts: list[Rows]) -> None:
    for i, part in enumerate(parts):
        save_file({"activations": torch.from_numpy(part.astype(np.float32))}, folder / f"{i}.safetensors")


def write_shards(folder: Path, parts: list[Rows]) -> None:
    """As InterPLM's `extract_embeddings` does."""
    for i, part in enumerate(parts):
        shard = folder / f"shard_{i + 8}"
        shard.mkdir()
        torch.save(torch.from_numpy(part.astype(np.float32)), shard / "activations.pt")
        about = f"d_model: {D}\ndtype: float32\nlayer: 3\nmodel: esm2\ntotal_tokens: {len(part)}\n"
        (shard / "metadata.yaml").write_text(about)


def write_memmaps(folder: Path, parts: list[Rows]) -> None:
    for i, part in enumerate(parts):
        shard = folder / f"shard_{i}"
        shard.mkdir()
        part.astype("<f2").tofile(shard / "activations.dat")
        about = {"total_tokens": len(part), "d_model": D, "dtype": "float16"}
        (shard / "metadata.json").write_text(json.dumps(about))


CONTEXT = 5


def arrow_table(part: Rows, name: str = "blocks.3.hook_resid_post") -> pa.Table:
    """As a Hugging Face dataset stores Array2D: a list of lists, under an extension that readers need not know."""
    inner = pa.ListArray.from_arrays(pa.array(np.arange(0, part.size + 1, D), pa.int32()), pa.array(part.reshape(-1)))
    outer = pa.ListArray.from_arrays(pa.array(np.arange(0, len(part) + 1, CONTEXT), pa.int32()), inner)
    kind = {
        b"ARROW:extension:name": b"datasets.features.features.Array2DExtensionType",
        b"ARROW:extension:metadata": json.dumps([[CONTEXT, D], "float32"]).encode(),
    }
    tokens = pa.array([[1] * CONTEXT] * len(outer), pa.list_(pa.int32()))
    return pa.table([outer, tokens], pa.schema([pa.field(name, outer.type, metadata=kind), ("token_ids", tokens.type)]))


def write_arrow(folder: Path, parts: list[Rows]) -> None:
    names = [f"data-{i:05d}-of-00003.arrow" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        table = arrow_table(part)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "data-left-over.arrow").write_bytes(b"not of this dataset")


Write = Callable[[Path, list[Rows]], None]
FORMATS: dict[str, tuple[Write, str, str]] = {
    "npy": (write_npy, "npy", "<f8"),
    "fortran": (write_fortran, "npy", "<f4"),
    "safetensors": (write_safetensors, "safetensors", "<f4"),
    "interplm": (write_shards, "interplm", "<f4"),
    "interplm-dat": (write_memmaps, "interplm", "<f2"),
    "saelens": (write_arrow, "saelens", "<f4"),
    "saelens-half": (write_arrow, "saelens", "<f2"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_any_range_of_rows_is_that_of_the_arrays(name: str, tmp_path: Path) -> None:
    write, kind, dtype = FORMATS[name]
    parts = [matrix(rows, i, dtype) for i, rows in enumerate((20, 15, 30))]
    write(tmp_path, parts)
    whole = np.concatenate(parts).astype(np.float32)
    source = open_source(str(tmp_path), "auto")
    assert (source.format, source.num_rows, source.d) == (kind, 65, D)
    for start, stop in ((0, 65), (3, 4), (19, 36), (34, 65), (65, 65), (7, 52)):
        assert np.array_equal(source.read(start, stop, torch.float32).numpy(), whole[start:stop])
    half = source.read(10, 40, torch.bfloat16)
    assert torch.equal(half, torch.from_numpy(whole[10:40]).to(torch.bfloat16))


def test_embeddings_with_boundaries_name_their_proteins(tmp_path: Path) -> None:
    rows = torch.from_numpy(matrix(12))
    body = {"embeddings": rows, "boundaries": [(0, 5), (5, 12)], "protein_ids": ["P1", "P2"]}
    torch.save(body, tmp_path / "shard_0.pt")
    source = open_source(str(tmp_path), "auto")
    documents, _ = documents_of(source)
    assert (documents.names, documents.lengths_C.tolist()) == (["P1", "P2"], [5, 7])
    assert torch.equal(source.read(2, 9, torch.float32), rows[2:9])


def test_the_digest_is_of_the_content_in_its_order(tmp_path: Path) -> None:
    def source_of(name: str, parts: list[Rows]) -> Source:
        (tmp_path / name).mkdir()
        write_npy(tmp_path / name, parts)
        return open_source(str(tmp_path / name), "auto")

    one, two = matrix(4, 1), matrix(4, 2)
    cache = tmp_path / "cache"
    same = [source_of(name, [one, two]).digest(cache) for name in ("first", "renamed")]
    assert same[0] == same[1] != source_of("exchanged", [two, one]).digest(cache)
    # Remembered by size and time of change: a changed file has another.
    changed = tmp_path / "renamed" / "acts-8.npy"
    np.save(changed, two)
    os.utime(changed, ns=(1, 1))
    assert open_source(str(tmp_path / "renamed"), "auto").digest(cache) != same[0]


def test_unknown_rows_are_held_out_in_blocks(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((256 * 400 + 7, 2), np.float32))
    source = open_source(str(tmp_path / "a.npy"), "auto")
    scans = {share: scan_imported(source, "d", share, None) for share in (0.0, 0.1, 0.3)}
    assert scans[0.1].lengths_P.tolist() == [256] * 400 + [7]
    assert scans[0.0].num_heldout_rows == 0
    for scan in scans.values():
        assert scan.num_rows + scan.num_heldout_rows == source.num_rows
        for side_P in (scan.heldout_P, ~scan.heldout_P):
            lengths_P = scan.lengths_P[side_P]
            assert scan.row_offset_P[side_P].tolist() == (np.cumsum(lengths_P) - lengths_P).tolist()
    assert 32 <= scans[0.1].heldout_P.sum() < 70
    assert (scans[0.3].heldout_P >= scans[0.1].heldout_P).all()  # a larger share only adds


def two_widths(folder: Path) -> None:
    np.save(folder / "1.npy", matrix(3))
    np.save(folder / "2.npy", np.zeros((3, D + 1), np.float32))


def lists_of_two_widths(folder: Path) -> None:
    table = pa.table({"acts": pa.array([[[1.0, 2.0], [3.0]]])})
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def mixed(folder: Path) -> None:
    write_npy(folder, [matrix(3)])
    write_safetensors(folder, [matrix(3)])


def two_tensors(folder: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}, folder / "a.safetensors")


def layers(folder: Path) -> None:
    for layer in (3, 4):
        (folder / f"layer_{layer}").mkdir()
        write_shards(folder / f"layer_{layer}", [matrix(3)])


def wrong_metadata(folder: Path) -> None:
    write_shards(folder, [matrix(3)])
    (folder / "shard_8" / "metadata.yaml").write_text(f"total_tokens: 4\nd_model: {D}\n")


def cut_memmap(folder: Path) -> None:
    write_memmaps(folder, [matrix(3)])
    with (folder / "shard_0" / "activations.dat").open("r+b") as file:
        file.truncate(20)


def holes(folder: Path) -> None:
    body = {"embeddings": torch.zeros(9, D), "boundaries": [(0, 5), (6, 9)]}
    torch.save(body, folder / "shard_0.pt")


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("trapped",))


def pickled(folder: Path) -> None:
    (folder / "shard_0").mkdir()
    (folder / "shard_0" / "activations.pt").write_bytes(pickle.dumps(Trap()))


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "absent": (lambda folder: folder.rmdir(), "does not exist"),
    "nothing": (lambda folder: None, "holds no activations"),
    "empty": (lambda folder: np.save(folder / "a.npy", np.zeros((0, D), np.float32)), "has no rows"),
    "widths": (two_widths, rf"2.npy has rows of width {D + 1}, those of 1.npy are {D} wide"),
    "ragged": (lists_of_two_widths, "rows of different widths, 1 to 2"),
    "whole numbers": (
        lambda folder: np.save(folder / "a.npy", np.zeros((3, D), np.int32)),
        "holds int32, not floating",
    ),
    "cube": (lambda folder: np.save(folder / "a.npy", np.zeros((2, 3, D), np.float32)), r"\[2, 3, 6\], not a matrix"),
    "objects": (lambda folder: np.save(folder / "a.npy", np.array([[{}]]), allow_pickle=True), "holds Python objects"),
    "noise": (lambda folder: (folder / "a.npy").write_bytes(b"noise") and None, "a.npy"),  # type: ignore[func-returns-value]
    "cut safetensors": (lambda folder: (folder / "a.safetensors").write_bytes(b"12345678{") and None, "cannot be read"),  # type: ignore[func-returns-value]
    "noise arrow": (lambda folder: (folder / "a.arrow").write_bytes(b"noise") and None, "not a sound Arrow"),  # type: ignore[func-returns-value]
    "two formats": (mixed, "several formats: npy, safetensors"),
    "two tensors": (two_tensors, r"has 2 tensors \(a, b\)"),
    "folders of layers": (layers, r"holds no activations[\s\S]*layer_\{layer\}"),
    "metadata": (wrong_metadata, "holds 3, its metadata say total_tokens 4"),
    "cut memmap": (cut_memmap, "has 20 bytes, its metadata say 3 rows of 6 float16"),
    "boundaries": (holes, "boundaries that do not tile its 9 rows"),
    "pickle": (pickled, "which is not data|not a checkpoint"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_imported_says_why(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "acts"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=message):
        open_source(str(folder), "auto")
    assert not Path("trapped").exists()


@pytest.mark.parametrize(("value", "dtype", "message"), [
    (np.nan, torch.bfloat16, "row 17 has NaN or infinity"),
    (np.inf, torch.float32, "row 17 has NaN or infinity"),
    (1e6, torch.float16, "row 17 is beyond the range of embed.dtype float16"),
])  # fmt: skip
def test_numbers_that_are_none_are_named(value: float, dtype: torch.dtype, message: str, tmp_path: Path) -> None:
    parts = [matrix(20, 0), matrix(20, 1)]
    parts[1][17, 3] = value
    write_npy(tmp_path, parts)
    source = open_source(str(tmp_path), "npy")
    source.read(0, 37, dtype)
    with pytest.raises(UserError, match=f"acts-9.npy {message}"):
        source.read(30, 40, dtype)


def test_mapped_files_are_never_whole_in_memory(tmp_path: Path) -> None:
    """A sparse file of 8 GB, of which a few rows are read."""
    path = tmp_path / "large.npy"
    np.lib.format.open_memmap(path, "w+", np.float32, (2_000_000, 1000))
    source = open_source(str(path), "auto")
    assert source.num_rows == 2_000_000
    assert torch.equal(source.read(1_999_990, 2_000_000, torch.float32), torch.zeros(10, 1000))
