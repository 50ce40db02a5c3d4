"""Results on a run's W&B page: by the real package, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.runtime import wandb_results
from plmsae_cli.runtime.wandb_results import figures, publish, trials

SCORES = {
    "schema": 1,
    "demo": False,
    "k": 4,
    "fidelity": {"fvu": 0.25, "l0_deciles": [1, 2], "loss": {"masked": {"ce": 2.5}}},
}
SWEEP = {
    "grid": {"train.sae.k": [4, 8], "train.lr": ["auto"]},
    "trials": [
        {"hash": "aa", "values": {"train.sae.k": 4, "train.lr": "auto"}, "state": "done", "metrics": {"fvu": 0.25}},
        {"hash": "bb", "values": {"train.sae.k": 8, "train.lr": "auto"}, "state": "failed", "metrics": {}},
    ],
}


def experiment(**wandb: Any) -> Experiment:
    body = {"name": "test", "embed": {"fasta": "a.fasta", "layers": [1]}, "wandb": {"mode": "offline", **wandb}}
    return Experiment.model_validate(body)


def write(path: Path, body: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body))


def finished(folder: Path) -> Path:
    write(folder / "eval" / "metrics.json", SCORES)
    pq.write_table(
        pa.table({"latent": [0, 1], "density": [0.1, 0.2], "list": [[1], [2]], "top_protein": ["P1", None]}),
        folder / "eval" / "latents.parquet",
    )
    write(folder / "sae" / "sae.json", {})
    (folder / "sae" / "sae.safetensors").write_bytes(b"the weights themselves")
    pointer = {"folder": "s3://bucket/data/optimize-0123", "key": "0123", "rows": 99}
    write(folder / "artifacts.json", {"optimize": pointer})
    return folder


def test_names_are_paths_and_values_those_of_the_file() -> None:
    assert figures(SCORES) == {
        "eval/schema": 1,
        "eval/k": 4,
        "eval/fidelity/fvu": 0.25,
        "eval/fidelity/loss/masked/ce": 2.5,
    }
    assert trials(SWEEP) == (
        ["trial", "state", "train.sae.k", "train.lr", "fvu"],
        [["aa", "done", 4, '"auto"', 0.25], ["bb", "failed", 8, '"auto"', None]],
    )


def test_a_finished_run_and_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb")
    run = finished(tmp_path / "run")
    publish(experiment(), run)
    write(tmp_path / "sweep" / "sweep.json", SWEEP)
    publish(experiment(), tmp_path / "sweep")
    assert capsys.readouterr().err.count("upload them with: wandb sync ") == 2
    (log,) = (run / "wandb").glob("offline-run-*/*.wandb")
    content = log.read_bytes()
    for text in ("eval/fidelity/fvu", "eval/latents", "optimize-0123", "s3://bucket/data/optimize-0123", "sae-test"):
        assert text.encode() in content or text.split("/")[-1].encode() in content, text
    for path in (run / "wandb").rglob("*"):
        assert not path.is_file() or b"the weights themselves" not in path.read_bytes(), "artifacts go by reference"
    (table,) = (run / "wandb").rglob("*.table.json")
    assert json.loads(table.read_text())["data"] == [[1, 0.2, None], [0, 0.1, "P1"]]
    (shown,) = (tmp_path / "sweep" / "wandb").rglob("*.table.json")
    assert json.loads(shown.read_text())["columns"] == ["trial", "state", "train.sae.k", "train.lr", "fvu"]


def test_switched_off_or_broken_it_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path / "run")
    publish(experiment(mode="off"), run)
    publish(experiment(), tmp_path / "empty")
    assert not (run / "wandb").exists()

    def down(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(wandb_results, "start_wandb", down)
    publish(experiment(), run)
    assert (
        capsys.readouterr().err == f"W&B has not taken the results (ConnectionError: no network); they are in {run}\n"
    )
