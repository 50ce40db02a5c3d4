"""Two queued experiments that differ in k, data on S3, killed once in each stage: both end as if nothing had been."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import plmsae_cli
from plmsae_cli.config.yaml import load
from plmsae_cli.runtime.saved import load_sae
from plmsae_cli.store.fs import Store
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import verify
from tests.conftest import random_esm2

Run = Callable[..., subprocess.CompletedProcess[str]]
ASSETS = Path(plmsae_cli.__file__).parent / "data"

EXPERIMENT = """
root: {root}
data_root: {data}
storage: {{endpoint_url: {endpoint}, allow_http: true}}
model: {{weights: {weights}}}
embed: {{fasta: {fasta}, layers: [2], holdout: 0.1, dtype: float32, shard: 200kB}}
shuffle: {{seed: 3, memory: 200kB}}
optimize: {{chunk: 128kB, block_rows: 64}}
train:
  sae: {{expansion: 2, k: {k}}}
  batch_tokens: 128
  tokens: 2560
  log_every: 1
  checkpoint_every: 5
eval: {{fidelity: {{proteins: 4}}}}
"""

FAULTS = [
    "kill:embed.shard-00001.begin",  # before a shard
    "kill:embed.shard-00001.written",  # its files are there, its record is not
    "kill:embed.manifest",
    "kill:shuffle.map-00002.written",
    "kill:shuffle.finish.begin",
    "kill:optimize.reduce-00001.begin",
    "kill:optimize.manifest",
    "kill:train.step:8",
    "kill:checkpoint.before-commit:2",
    "kill:checkpoint.before-rotation:2",
    "kill:checkpoint.in-rotation",
    "kill:train.train.written",
]


def write(folder: Path, name: str, **values: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(EXPERIMENT.format(**values))
    return path


def test_killed_in_every_stage_and_continued(plmsae: Run, s3: object, tmp_path: Path) -> None:
    weights = random_esm2(tmp_path / "weights")
    fasta = ASSETS / "smoke.fasta.gz"
    common = {"endpoint": s3.endpoint_url, "weights": weights, "fasta": fasta}  # type: ignore[attr-defined]
    data, calm = (s3.url(name) for name in ("killed", "calm"))  # type: ignore[attr-defined]

    # The reference: the same experiments, never disturbed, with data of their own.
    quiet = tmp_path / "calm"
    for k in (4, 6):
        write(quiet, f"k{k}.yaml", root=tmp_path / "calm-runs", data=calm, k=k, **common)
    assert plmsae("run", str(quiet)).returncode == 0

    queue = tmp_path / "queue"
    paths = [write(queue, f"k{k}.yaml", root=tmp_path / "runs", data=data, k=k, **common) for k in (4, 6)]
    for fault in FAULTS:
        killed = plmsae("run", str(queue), fault=fault)
        assert killed.returncode == -9, f"{fault}: {killed.stderr}"
    final = plmsae("run", str(queue), "--json")
    assert final.returncode == 0, final.stderr
    body = json.loads(final.stdout)
    assert {e["state"] for e in body["queue"]} <= {"done", "skipped"}
    # The second experiment embedded, shuffled and optimized nothing, in any of its starts.
    second = json.loads((tmp_path / "runs" / "k6" / "status.json").read_text())
    assert set(second["stage_seconds"]) == {"train", "eval"}

    for k, path in zip((4, 6), paths, strict=True):
        ours, theirs = tmp_path / "runs" / f"k{k}", tmp_path / "calm-runs" / f"k{k}"
        first, second = load_sae(ours).state_dict(), load_sae(theirs).state_dict()
        assert all((first[name] == second[name]).all() for name in first)
        one, two = (json.loads((r / "eval" / "metrics.json").read_text()) for r in (ours, theirs))
        assert one == two
        steps = [json.loads(line)["step"] for line in (ours / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 21))
        experiment = load(path).experiment
        store = Store(experiment.storage)
        lineage = Lineage(experiment, store)
        for stage in ("embed", "shuffle", "optimize"):
            assert verify(store, getattr(lineage, stage)(2).folder) == []
    again = plmsae("run", str(queue), "--json")
    assert [e["state"] for e in json.loads(again.stdout)["queue"]] == ["skipped", "skipped"]


@pytest.mark.parametrize("signal_name", ["sigterm"])
def test_sigterm_checkpoints_and_leaves_with_75(plmsae: Run, tmp_path: Path, signal_name: str) -> None:
    fasta = ASSETS / "smoke.fasta.gz"
    values = {
        "root": tmp_path / "runs",
        "data": tmp_path / "data",
        "endpoint": "null",
        "weights": "bundled",
        "fasta": fasta,
    }
    path = write(tmp_path, "one.yaml", k=4, **values)
    stopped = plmsae("run", str(path), fault=f"{signal_name}:train.step:7")
    assert stopped.returncode == 75, stopped.stderr
    assert "stopping at the next safe point" in stopped.stderr
    assert json.loads((tmp_path / "runs" / "one" / "status.json").read_text())["state"] == "interrupted"
    assert sorted((tmp_path / "runs" / "one" / "checkpoints").glob("step-*"))[-1].name == "step-00000007"
    assert plmsae("run", str(path)).returncode == 0
