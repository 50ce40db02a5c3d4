"""SAEs on one stream, killed at every awkward point: each ends as the run it would be alone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import plmsae_cli
from plmsae_cli.config.yaml import load
from plmsae_cli.stages.sweep import trials
from plmsae_cli.store.checkpoint import load_newest
from tests.conftest import random_esm2

Run = Callable[..., subprocess.CompletedProcess[str]]
ASSETS = Path(plmsae_cli.__file__).parent / "data"
CLOCK = {"tokens_per_second", "loader_wait", "step_ms", "loader_share"}

EXPERIMENT = """
root: {root}
data_root: {data}
launch: {{gpus: 0}}
model: {{weights: {weights}}}
embed: {{fasta: {fasta}, layers: [2], holdout: 0.1, dtype: float32, shard: 200kB}}
shuffle: {{seed: 3, memory: 400kB}}
optimize: {{chunk: 128kB, block_rows: 64}}
train:
  sae: {{expansion: 2, k: 4}}
  batch_tokens: 128
  tokens: 2560
  log_every: 1
  checkpoint_every: 5
"""
SAES = "  saes: [{k: 2}, {k: 6, architecture: batch_topk}, {k: 8, init: data}]\n"

# Three members, checkpoints after 5, 10, 15 and 20 steps.
FAULTS = [
    "kill:checkpoint.before-commit:5",  # one has step 10, two have step 5
    "kill:checkpoint.before-rotation:3",  # the two catch up; one has step 15 just now
    "kill:checkpoint.before-commit:5",  # again behind each other, at the end
    "kill:train.train.written",  # all exported, none recorded
]
STEPS = [[10, 5, 5], [15, 10, 10], [20, 20, 15], [20, 20, 20]]


def science(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def steps(run: Path) -> int:
    found = load_newest(run / "checkpoints")
    return 0 if found is None else found.step


@pytest.mark.slow
def test_killed_between_members_and_continued(plmsae: Run, tmp_path: Path) -> None:
    weights = random_esm2(tmp_path / "weights")
    common = {"data": tmp_path / "data", "weights": weights, "fasta": ASSETS / "smoke.fasta.gz"}
    path = tmp_path / "many.yaml"
    path.write_text(EXPERIMENT.format(root=tmp_path / "runs", **common) + SAES)
    found = trials(load(path).experiment)
    for fault, reached in zip(FAULTS, STEPS, strict=True):
        killed = plmsae("run", str(path), fault=fault)
        assert killed.returncode == -9, f"{fault}: {killed.stderr}"
        assert [steps(trial.run) for trial in found] == reached
    listed = json.loads(plmsae("ls", str(tmp_path / "runs"), "--json").stdout)["runs"]
    assert [run["state"] for run in listed] == ["killed"] * 4
    final = plmsae("run", str(path))
    assert final.returncode == 0, final.stderr

    lone = tmp_path / "lone"
    lone.mkdir()
    for trial in found:
        own = trial.experiment.train
        assert own is not None
        text = EXPERIMENT.format(root=tmp_path / "alone", **common)
        sae = json.dumps(own.autoencoder().model_dump())
        (lone / f"{trial.hash}.yaml").write_text(text.replace("{expansion: 2, k: 4}", sae))
    assert plmsae("run", str(lone)).returncode == 0
    for trial in found:
        ours, theirs = trial.run, tmp_path / "alone" / trial.hash
        assert science(ours) == science(theirs)
        first, second = load_newest(ours / "checkpoints"), load_newest(theirs / "checkpoints")
        assert first is not None
        assert second is not None
        assert first.step == second.step == 20
        assert all(torch.equal(first.tensors[name], tensor) for name, tensor in second.tensors.items())
        names = ("sae/sae.safetensors", "sae/sae.json", "identity.json")
        assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)
