"""Ranks started by torchrun train together, as those that `launch.ranks` starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_ranks_of_torchrun_join_one_training(
    plmsae: Callable[..., Any], write: Callable[..., Path], tmp_path: Path
) -> None:
    alone, joined = write("alone.yaml", evaluation=""), write("joined.yaml", evaluation="")
    assert plmsae("train", alone, "--with-inputs").code == 0
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python",
        sys.executable, "-c", "from plmsae_cli.cli.app import main; main()", "train", str(joined), "--json",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["state"] == "done"  # said once
    run = tmp_path / "runs" / "joined"
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert losses(run) == pytest.approx(losses(tmp_path / "runs" / "alone"), rel=1e-4)
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    assert {"rank-0.safetensors", "rank-1.safetensors"} <= {file.name for file in newest.iterdir()}


@pytest.mark.parametrize("arguments", [["run"], ["embed"], ["train", "--with-inputs"], ["train", "--restart"]])
def test_everything_else_is_started_once(
    plmsae: Callable[..., Any], write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = write("data.yaml", evaluation="")
    if "--restart" in arguments:
        monkeypatch.delenv("RANK")
        assert plmsae("optimize", path, "--with-inputs").code == 0
        monkeypatch.setenv("RANK", "1")
    refused = plmsae(arguments[0], path, *arguments[1:])
    assert refused.code == 1
    assert "may start `plmsae train` alone" in refused.err
