"""`eval` of language models: without an autoencoder, of the experiment's own model, and every way to ask for nonsense."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from plmsae_cli.config.yaml import load
from plmsae_cli.plm.alphabet import encode, letters, wrap
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.runtime.masked_scores import masks
from plmsae_cli.store.fasta import records
from plmsae_cli.store.fs import Store
from plmsae_cli.store.tokens import write_tokens
from plmsae_cli.store.weights import PUBLISHED
from tests.cli.conftest import ASSETS, REPOSITORY, Plmsae

SEQUENCES = [sequence for _, _, sequence in records(ASSETS / "smoke.fasta.gz")]


@pytest.fixture
def score(tmp_path: Path, plmsae: Plmsae, shared: dict[str, Path]) -> Any:
    """Run an experiment of `eval` alone and give its metrics and its folder."""

    def run(evaluation: dict[str, Any], name: str = "scores", more: str = "") -> tuple[dict[str, Any], Path]:
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"root: {tmp_path / 'runs'}\neval: {json.dumps(evaluation)}\n{more}")
        outcome = plmsae("run", path, "--no-progress")
        assert outcome.code == 0, outcome.err
        folder = tmp_path / "runs" / name
        return json.loads((folder / "eval" / "metrics.json").read_text()), folder

    return run


def test_models_side_by_side_from_fasta_or_shards(
    score: Any, plmsae: Plmsae, shared: dict[str, Path], tmp_path: Path
) -> None:
    models = ["bundled", str(shared["weights"])]
    from_fasta, folder = score({"lm": {"models": models, "fasta": str(shared["fasta"]), "max_length": 60}})
    half = len(SEQUENCES) // 2
    for number, own in enumerate((SEQUENCES[:half], SEQUENCES[half:])):
        write_tokens(Store(), str(tmp_path / f"valid_{number}.bin"), [wrap(encode(s)) for s in own])
    options = {"models": models, "bin": str(tmp_path / "valid_*.bin"), "max_length": 60, "tasks": 3}
    from_shards, _ = score({"lm": options}, "shards")
    # The same proteins, the same masks: cut into three tasks each, from other files, every bit is the same.
    assert from_shards["lm"] == from_fasta["lm"]
    rows = from_fasta["lm"]["models"]
    assert [row["model"] for row in rows] == models
    cut = [letters(encode(sequence)[:60]) for sequence in SEQUENCES]
    assert rows[0]["residues"] == rows[1]["residues"] == sum(int(masks(text, 0.15).sum()) for text in cut) > 500
    assert rows[0]["loss"] < 2.75 < 3.2 < rows[1]["loss"]  # trained, and as drawn: ln 33 is 3.5
    assert from_fasta["lm"]["proteins"]["used"] == len(SEQUENCES)
    assert from_fasta["lm"]["proteins"]["cut"] == sum(len(s) > 60 for s in SEQUENCES)
    page = (folder / "report" / "index.html").read_text()
    assert "How well language models predict hidden residues" in page
    assert f"{rows[0]['loss']:.4f}" in page
    status = plmsae("status", folder)
    assert f"loss of bundled: {rows[0]['loss']:.3f}" in status.out, status
    again = plmsae("run", tmp_path / "scores.yaml", "--json", "--no-progress")
    assert json.loads(again.out)["experiments"][0]["evaluation"]["lm"] == from_fasta["lm"]
    # Continued with smaller batches, as after running out of memory.
    done = tmp_path / "runs" / "shards" / "parts"
    for part in (*done.glob("lm-*-1of3*"), *done.glob("lm-*-report.json"), *done.glob("merge-*")):
        part.unlink()
    smaller, _ = score({"lm": {**options, "batch_tokens": 500}}, "shards")
    for row, found in zip(rows, smaller["lm"]["models"], strict=True):
        assert found == {**row, "loss": pytest.approx(row["loss"]), "perplexity": pytest.approx(row["perplexity"])}
    first, _ = score({"lm": {**options, "sequences": 5}}, "first")
    assert first["lm"]["proteins"]["used"] == 5


def test_the_baseline_table_is_one_yaml(plmsae: Plmsae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it ships, but for the shards' place; the published models are small ones of their depths, as drawn."""
    example = REPOSITORY / "experiments" / "examples" / "plm-baselines.yaml"
    write_tokens(Store(), str(tmp_path / "omgprot50_valid_000000.bin"), [wrap(encode(s)) for s in SEQUENCES[:12]])
    command = [example, "--set", f"eval.lm.bin={tmp_path}/omgprot50_valid_*.bin", "--set", f"root={tmp_path}/runs"]
    monkeypatch.setenv("PLMSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    absent = plmsae("run", *command, "--dry-run")
    assert (absent.code, "plmsae fetch esm2_t6_8M_UR50D" in absent.err) == (2, True), absent
    models = load(example).experiment.eval.lm.models  # type: ignore[union-attr]
    for name in models:
        model = ESM2(ESM2Config(PUBLISHED[name], 8, 2))
        model.init_weights(0)
        about = argparse.Namespace(
            encoder_layers=PUBLISHED[name], encoder_embed_dim=8, encoder_attention_heads=2, token_dropout=True
        )
        path = tmp_path / "cache" / "weights" / f"{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"cfg": {"model": about}, "model": dict(model.state_dict())}, path)
    assert plmsae("run", *command, "--dry-run").code == 0
    done = plmsae("run", *command, "--no-progress")
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "runs" / example.stem / "eval" / "metrics.json").read_text())
    rows = metrics["lm"]["models"]
    assert [row["model"] for row in rows] == models
    assert all(3.3 < row["loss"] < 3.7 for row in rows), "as drawn: ln 33 is 3.5"
    assert {"perplexity", "accuracy", "precision", "recall", "f1", "mcc"} <= rows[0].keys()


def test_the_model_that_the_experiment_trains(score: Any, shared: dict[str, Path], tmp_path: Path) -> None:
    train = {
        "kind": "plm", "batch_tokens": 512, "tokens": 2048, "log_every": 1,
        "plm": {"fasta": str(shared["fasta"]), "num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "max_length": 128,
                "pack_tokens": 256},
    }  # fmt: skip
    lm = {"models": ["trained", "bundled"], "fasta": str(shared["fasta"]), "sequences": 10}
    found, folder = score({"lm": lm}, "own", f"train: {json.dumps(train)}\n")
    assert [row["model"] for row in found["lm"]["models"]] == ["own", "bundled"]
    # Named by its folder from elsewhere, it is the same model with the same figures.
    other, _ = score({"lm": {**lm, "models": [str(folder)]}}, "other")
    same = {k: v for k, v in other["lm"]["models"][0].items() if k != "model"}
    assert same == {k: v for k, v in found["lm"]["models"][0].items() if k != "model"}


def test_representations_tell_what_is_planted(score: Any, plmsae: Plmsae, tmp_path: Path) -> None:
    """Labels that the composition gives are read off the layers, random ones are not; the page and the tables say which."""
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACDEFGHIKL"), 20, p=p)) for p in rng.dirichlet(np.ones(10), 300)]
    leucines = [sum(letter in "LIFA" for letter in s) for s in sequences]
    tables = {
        "oily.csv": [f"{s},{n / 20}" for s, n in zip(sequences, leucines, strict=True)],
        "class.csv": [f"{s},{'yes' if n > 8 else 'no'}" for s, n in zip(sequences, leucines, strict=True)],
        "noise.csv": [f"{s},{'yes' if n else 'no'}" for s, n in zip(sequences, rng.integers(0, 2, 300), strict=True)],
    }
    for name, lines in tables.items():
        (tmp_path / name).write_text("sequence,label\n" + "\n".join(lines) + "\n")
    options = {
        "models": ["bundled"],
        "tasks": [str(tmp_path / name) for name in tables],
        "layers": [0, 2],
        "clusters": "hash",
    }
    found, folder = score({"representations": options})
    (model,) = found["representations"]["models"]
    oily, named, noise = (task["score"] for task in model["tasks"])
    assert oily > 0.9
    assert named > 0.7
    assert abs(noise) < 0.4  # 60 proteins: three deviations
    assert model["score"] == pytest.approx((oily + named + noise) / 3)
    for task in model["tasks"]:
        best = max(task["layers"], key=lambda row: row["valid"])
        assert (task["layer"], task["score"]) == (best["layer"], best["test"])
    table = pq.read_table(folder / "eval" / "representations" / "layers.parquet")
    assert table.num_rows == 6
    assert "What can be read off the layers" in (folder / "report" / "index.html").read_text()
    assert "representations of bundled" in plmsae("status", folder).out


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({}, "eval needs a train section"),
        ({"lm": {"fasta": "x.fasta"}, "fidelity": {"proteins": 3}}, "eval.fidelity needs a train section"),
        ({"lm": {"models": ["bundled"]}}, "neither is given"),
        ({"lm": {"models": ["trained"], "fasta": "x.fasta"}}, "trained is the model of train.kind: plm"),
        ({"lm": {"models": ["bundled", "bundled"], "fasta": "x.fasta"}}, "names one twice"),
        (
            {"lm": {"models": ["bundle"], "fasta": str(ASSETS / "smoke.fasta.gz")}},
            "eval.lm.models: 'bundle' is no published",
        ),
        ({"lm": {"models": ["bundled"], "fasta": "absent.fasta"}}, "absent.fasta"),
        ({"lm": {"models": ["bundled"], "bin": "absent_*.bin"}}, "no token shard matches"),
        ({"representations": {"models": ["bundled"], "tasks": ["t.csv"], "layers": [9]}}, "layers 0 to 8, none of [9]"),
        ({"representations": {"models": ["bundled"], "tasks": ["t.csv"], "layers": []}}, "layers is an empty list"),
        ({"lm": {"mask_rat": 0.1, "fasta": "x.fasta"}}, "did you mean eval.lm.mask_rate"),
        ({"representations": {"tasks": ["structure"]}}, "structure is no task and no CSV file"),
        ({"representations": {"tasks": ["localisation"]}}, "localisation needs annotated proteins"),
        ({"representations": {"tasks": ["a.csv"], "annotations": "x.dat"}}, "annotations has no effect"),
    ],
)
def test_nonsense_is_refused(plmsae: Plmsae, tmp_path: Path, evaluation: dict[str, Any], message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(f"root: {tmp_path / 'runs'}\neval: {json.dumps(evaluation)}\n")
    outcome = plmsae("run", path, "--no-progress")
    assert outcome.code != 0
    assert message in outcome.err, outcome.err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("metrics.json"))


def test_bugfix_measures_something_small(plmsae: Plmsae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "big.yaml").write_text(
        "eval: {lm: {models: [esm2_t36_3B_UR50D, bundled], bin: 's3://bucket/valid_*.bin'}, representations: {tasks: [x.csv]}}\n"
    )
    outcome = plmsae("run", tmp_path / "big.yaml", "--bugfix", "--no-progress")
    assert outcome.code == 0, outcome.err
