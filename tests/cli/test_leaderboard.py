"""`ls --leaderboard`: who is first, by what, and what is told of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from plmsae_cli.store.checkpoint import Checkpoint, save
from plmsae_cli.store.fs import Store
from plmsae_cli.store.tensorfile import write_tensors
from tests.cli.conftest import Plmsae

YAML = """
name: {name}
train: {{kind: plm, plm: {{fasta: x, speedrun: {speedrun}}}}}
price: {{gpu_hour: {price}}}
"""


def run(root: Path, name: str, losses: list[float], seconds: float, **about: Any) -> None:
    """A run as training leaves it: a validation every 10 steps, a line of the clock a step before each."""
    folder = root / name
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for number, loss in enumerate(losses, start=1):
        told = seconds * number / len(losses)
        lines.append({"step": 10 * number - 1, "tokens": 1000 * number - 100, "loss": 9.0, "train_seconds": told})
        valid = {about.get("set", "random"): {"loss": loss, "perplexity": 1.0, "accuracy": 0.1, "residues": 5}}
        lines.append({"step": 10 * number, "tokens": 1000 * number, "valid": valid})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99')
    values = {"speedrun": "null", "price": "null"} | about
    (folder / "resolved.yaml").write_text(YAML.format(name=name, **values))
    (folder / "environment.json").write_text(
        json.dumps({"device": "H100", "commit": "f" * 40, "dirty": about.get("dirty", False)})
    )
    world = about.get("world", 1)
    for rank in reversed(range(world)):  # the first commits
        save(folder / "checkpoints", Checkpoint(10, {"w": torch.zeros(4)}, {}), keep=2, rank=rank, world=world)
    if "clock" in about:
        (folder / "plm").mkdir()
        facts = {"steps": 10 * len(losses), "train_seconds": about["clock"]}
        (folder / "plm" / "config.json").write_text(json.dumps({"facts": facts}))
    if "width" in about:
        tensors = {"embedding": torch.zeros(33, about["width"]), "rotary.inv_freq": torch.zeros(7)}
        write_tensors(Store(), str(folder / "plm" / "model.safetensors"), tensors)
    if "score" in about:
        (folder / "eval").mkdir()
        models = [{"model": "esm2", "score": 0.99}, {"model": name, "score": about["score"]}]
        (folder / "eval" / "metrics.json").write_text(json.dumps({"representations": {"models": models}}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    run(tmp_path, "slow", [2.5, 2.05, 1.9], 3000.0, price=2.0, world=2, width=10, clock=3100.0)
    run(tmp_path, "fast", [2.09, 2.0], 1000.0, dirty=True, set="valid")
    run(tmp_path, "never", [2.4, 2.2], 100.0)
    run(tmp_path, "own-target", [2.4, 2.2], 4000.0, speedrun="{target_loss: 2.3}")
    run(tmp_path, "too-large", [1.0], 1.0, speedrun="{target_loss: 2.3, max_parameters: 329}", width=10)
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "metrics.jsonl").write_text('{"step": 1, "fvu": 0.1}\n')
    (tmp_path / "sae" / "resolved.yaml").write_text("train: {kind: sae}\n")
    return tmp_path


def test_speed_is_the_training_time_to_the_target(plmsae: Plmsae, root: Path) -> None:
    found = json.loads(plmsae("ls", root, "--leaderboard", "speed", "--json").out)
    rows = {row["run"]: row for row in found["runs"]}
    assert list(rows) == ["fast", "slow", "own-target"]
    assert (rows["fast"]["seconds"], rows["slow"]["seconds"], rows["own-target"]["seconds"]) == (500.0, 2000.0, 4000.0)
    assert (rows["slow"]["loss"], rows["slow"]["tokens"], rows["slow"]["parameters"]) == (2.05, 2000, 330)
    assert rows["slow"]["hardware"] == "2 x H100"
    assert rows["slow"]["cost"] == pytest.approx(2.0 * 2 * 2000 / 3600, abs=1e-4)
    assert (rows["fast"]["cost"], rows["fast"]["parameters"], rows["fast"]["commit"]) == (None, None, "f" * 12 + "+")


def test_quality_is_the_last_loss_until_all_have_representations(plmsae: Plmsae, root: Path, tmp_path: Path) -> None:
    found = json.loads(plmsae("ls", root, "--leaderboard", "quality", "--json").out)
    assert [row["run"] for row in found["runs"]] == ["too-large", "slow", "fast", "never", "own-target"]
    assert [row["loss"] for row in found["runs"]] == [1.0, 1.9, 2.0, 2.2, 2.2]
    seconds = {row["run"]: row["seconds"] for row in found["runs"]}
    assert (seconds["slow"], seconds["fast"]) == (3100.0, 1000.0), (
        "of a finished run its clock, else that of the last line"
    )
    other = tmp_path / "other"
    run(other, "a", [1.0], 1.0, score=0.3)
    run(other, "b", [2.0], 1.0, score=0.6)
    found = json.loads(plmsae("ls", other, "--leaderboard", "quality", "--json").out)
    assert [(row["run"], row["representations"]) for row in found["runs"]] == [("b", 0.6), ("a", 0.3)]


def test_a_table_for_people_and_wrong_words(plmsae: Plmsae, root: Path, tmp_path: Path) -> None:
    shown = plmsae("ls", root, "--leaderboard", "speed").out.splitlines()
    assert shown[0].split() == ["run", "parameters", "hardware", "time", "cost", "loss", "representations", "commit"]
    assert "fast" in shown[1]
    assert shown[1].startswith("1 ")
    wrong = plmsae("ls", root, "--leaderboard", "beauty")
    assert wrong.code != 0
    assert "no track beauty" in wrong.err
    (tmp_path / "empty").mkdir()
    assert "no language-model run" in plmsae("ls", tmp_path / "empty", "--leaderboard", "speed").out
