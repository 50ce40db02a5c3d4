"""Bad input gets one clear error: which file, what is wrong, what to do; exit 2 before anything ran, no traceback."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

Plmsae = Callable[..., Any]
Write = Callable[..., Path]


def fasta(num_proteins: int, first: int = 0) -> bytes:
    draw = random.Random(first)
    records = (
        f">p{i}\n{''.join(draw.choices('ACDEFGHIKLMNPQRSTVWY', k=40))}\n" for i in range(first, first + num_proteins)
    )
    return "".join(records).encode()


GOOD = fasta(60)
FASTA_CASES = {
    "empty file": (b"", "x.fasta is empty", "hint: "),
    "no header": (b"MKVLAA\n" + GOOD, "x.fasta line 1: no header", "begins with a line such as"),
    "id twice": (GOOD + fasta(1), "x.fasta line 121: the id p0 was used before, on line 1", "duplicates: first"),
    "no residues": (GOOD + b">z\n\n", "x.fasta line 121: protein z has no residues", "empty: skip"),
    "binary": (random.Random(0).randbytes(3000), "x.fasta is a binary file", "FASTA text"),
    "too few for a batch": (fasta(3), "train.batch_tokens = 128 is more than", "embed more proteins"),
}
SETTINGS = {
    "layer": ("embed.layers=[9]", "layers 0 to 3, 9 is not one", "last layer is 3"),
    "fewer latents than k": ("train.sae.k=65", "train.sae.k (65) is larger than the dictionary (64", "lower k"),
    "batch above rows": ("train.batch_tokens=100000", "100000 is more than the 3099 rows", "at most 3099"),
    "batch over ranks": ("launch.ranks=3", "128 does not split evenly over 3 ranks", "129"),
    "gpus": ("launch.gpus=64", "launch.gpus asks for 64 GPUs", "lower launch.gpus"),
    "weights": ("model.weights=./nowhere", "'./nowhere' is no published name", "esm2_t33_650M_UR50D"),
    "fasta": ("embed.fasta=./nowhere.fasta", "./nowhere.fasta", "relative paths start at"),
    "fasta is a folder": ("embed.fasta=.", ". is a folder", "name a FASTA file"),
}


def refused(outcome: Any, *said: str, code: int = 2) -> None:
    """One error with its remedy, the words expected, the code, and nothing from Python's depths."""
    assert outcome.code == code, outcome.err
    for words in said:
        assert words in outcome.err
    assert outcome.err.count("error: ") == 1
    assert "hint: " in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("case", FASTA_CASES)
def test_a_bad_fasta(plmsae: Plmsae, write: Write, tmp_path: Path, case: str) -> None:
    content, *said = FASTA_CASES[case]
    path = tmp_path / "x.fasta"
    path.write_bytes(content)
    yaml = write(fasta=path)
    refused(plmsae("run", yaml), *said)
    refused(plmsae("validate", yaml), *said)
    assert not (tmp_path / "runs").exists()


def test_a_compressed_fasta_cut_short(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    path = tmp_path / "x.fasta.gz"
    path.write_bytes(gzip.compress(GOOD)[:-200])
    refused(plmsae("run", write(fasta=path)), "x.fasta.gz: the gzip stream is cut short", "gzip -t")


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_do_not_fit_the_input(
    plmsae: Plmsae, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    change, *said = SETTINGS[case]
    refused(plmsae("run", write(), "--set", change), *said)
    assert not (tmp_path / "runs").exists()


def test_more_ranks_than_gpus(plmsae: Plmsae, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plmsae_cli.runtime.device.visible_gpus", lambda: 1)
    monkeypatch.setattr("plmsae_cli.runtime.embedding.forecast._rate", lambda *_: (None, "a GPU that is not there"))
    refused(plmsae("run", write(), "--set", "launch.ranks=2"), "launch.ranks asks for 2 ranks on 1 GPU", "lower launch")


def test_gpus_that_torch_cannot_use(plmsae: Plmsae, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """No verb computes on the CPU in silence beside an idle GPU."""
    monkeypatch.setattr("plmsae_cli.runtime.device.installed_gpus", lambda: 2)
    refused(plmsae("run", write()), "this machine has 2 GPU(s), but torch", "launch.gpus: 0")


def test_weights_that_no_torch_can_read(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"nonsense")
    refused(plmsae("run", write(weights=tmp_path / "w.pt")), "w.pt is not a checkpoint")


def dataset(plmsae: Plmsae, write: Write) -> str:
    """A finished dataset: layer 2 of the tiny model, 32 numbers wide."""
    made = plmsae("optimize", write("maker.yaml"), "--with-inputs", "--json")
    return str(json.loads(made.out)["artifacts"]["optimize"]["folder"])


def test_a_dataset_of_another_model(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(
        f"root: {tmp_path}/runs\nmodel: {{weights: bundled}}\n"
        f"train: {{data: {dataset(plmsae, write)}, sae: {{expansion: 2, k: 4}}, batch_tokens: 128, tokens: 1280}}\n"
        "eval: {fidelity: {proteins: 4}}\n"
    )
    ended = plmsae("run", path)
    assert ended.code in (1, 2)
    refused(ended, "model.weights is bundled", "loss_recovered: false", code=ended.code)


def test_a_folder_that_is_no_dataset(plmsae: Plmsae, tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(f"root: {tmp_path}/runs\ntrain: {{data: {tmp_path}}}\n")
    refused(plmsae("train", path), f"train.data: {tmp_path} is not a finished dataset", "plmsae ls")


@pytest.mark.parametrize("field", ["root", "data"])
def test_a_file_where_a_folder_should_be(plmsae: Plmsae, write: Write, tmp_path: Path, field: str) -> None:
    (tmp_path / "file").write_text("")
    refused(plmsae("run", write(**{field: tmp_path / "file" / "below"})), "file is not a folder", "name another folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    refused(plmsae("run", write(root=closed / "runs")), "closed cannot be written to", "name another folder")


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Let this process write no file above so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("stage", "limit"), [("embed", 50_000), ("shuffle", 60_000), ("optimize", 40_000), ("train", 9_000)]
)
def test_a_file_that_cannot_be_written_to_its_end(
    plmsae: Plmsae, write: Write, tmp_path: Path, small_files: Callable[[int], None], stage: str, limit: int
) -> None:
    """The error names the file; what was there stays; with room again, the same command finishes."""
    path = write(data=tmp_path / "data", evaluation="")
    stages = ["embed", "shuffle", "optimize", "train"]
    for earlier in stages[: stages.index(stage)]:
        assert plmsae(earlier, path).code == 0
    small_files(limit)
    ended = plmsae(stage, path)
    small_files(resource.RLIM_INFINITY)
    refused(ended, "cannot write ", code=1)
    assert json.loads((tmp_path / "runs" / "one" / "status.json").read_text())["state"] == "failed"
    assert not [p for p in tmp_path.rglob("*") if ".tmp" in p.name]
    assert plmsae(stage, path).code == 0


def test_a_full_disk(plmsae: Plmsae, write: Write, tmp_path: Path, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(1)
    path = write(data=disk / "data")
    ended = plmsae("run", path)
    refused(ended, str(disk / "data"), "full", code=1)
    assert json.loads((tmp_path / "runs" / "one" / "status.json").read_text())["state"] == "failed"
    path.write_text(path.read_text().replace(str(disk / "data"), str(tmp_path / "data")))
    assert plmsae("run", path).code == 0


def test_a_disk_that_has_no_room_for_the_runs_own_files(
    plmsae: Plmsae, write: Write, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(1)
    with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    refused(plmsae("run", write(root=disk / "runs")), "runs/one/", "No space left", "free some space", code=1)


def test_folders_that_nothing_can_be_written_to(
    plmsae: Plmsae, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that is mounted read-only."""
    access = os.access
    path = write(root=tmp_path / "there")
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(os, "access", lambda p, mode: mode != os.W_OK and access(p, mode))
    refused(plmsae("validate", path), f"root: {tmp_path}/there cannot be written to", "name another folder in root")
    path = write(root=tmp_path / "absent" / "runs")
    refused(plmsae("validate", path), f"absent/runs cannot be made, {tmp_path} cannot be written to")
    refused(plmsae("run", tmp_path), f"{tmp_path} cannot be written to", "a queue keeps its lock", "one by one")
