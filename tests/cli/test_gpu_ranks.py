"""Runs on two GPUs end when asked to, name a rank that was killed, go on: communicators close though steps are CUDA graphs.

A start takes a while (imports, NCCL, the kernels' first compilation), so each test makes two and trains little.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
STEPS, EVERY = 6000, 10
"""Steps of a training, of a millisecond or two, and how often one is told; a wish to stop is heard within a second or so."""
Start = Callable[..., Any]


@pytest.fixture
def experiment(write: Callable[..., Path]) -> Callable[[str, str], Path]:
    def make(name: str, parallel: str) -> Path:
        return write(
            f"{name}.yaml",
            more="launch: {ranks: 2}\n",
            tokens=128 * STEPS,
            log=EVERY,
            checkpoint=1000,
            evaluation=f"  parallel: {parallel}\n  kernels: fused\n  dead_tokens: 12800\n",
        )

    return make


def told(run: Path) -> list[int]:
    """Steps that metrics.jsonl tells of."""
    metrics = run / "metrics.jsonl"
    text = metrics.read_text() if metrics.exists() else ""
    return [json.loads(line)["step"] for line in text[: text.rfind("\n") + 1].splitlines()]


def due(last: int) -> list[int]:
    """Steps that a training tells of up to `last`, each once however often it was stopped: the first, then every so many."""
    return [1, *range(EVERY, last + 1, EVERY)]


def behind(run: Path, step: int) -> Callable[[], bool]:
    return lambda: (told(run) or [0])[-1] > step


def state(run: Path) -> Any:
    return json.loads((run / "status.json").read_text())


def ended(process: Any, run: Path, seconds: float = 60.0) -> int:
    """The exit code; nothing of the process is left."""
    try:
        code = int(process.wait(seconds))
    except subprocess.TimeoutExpired:
        pytest.fail(f"HANG: {process.family()} are alive, last step {(told(run) or [0])[-1]}\n{process.log}")
    assert process.gone(), f"HANG: processes {process.family()} outlive the command\n{process.log}"
    return code


@pytest.mark.parametrize("parallel", ["data", "latents"])
def test_two_gpus_end_at_sigterm_and_resume(
    parallel: str, start: Start, experiment: Callable[[str, str], Path], tmp_path: Path
) -> None:
    path, run = experiment(parallel, parallel), tmp_path / "runs" / parallel
    process = start("train", path, "--with-inputs", "--no-progress")
    process.until(behind(run, 200), seconds=90)  # graphs are being replayed
    process.popen.send_signal(signal.SIGTERM)
    assert ended(process, run) == 75, process.log
    assert 200 < told(run)[-1] < STEPS
    assert state(run)["state"] == "interrupted"

    again = start("train", path, "--no-progress")
    assert ended(again, run, 90) == 0, again.log
    assert told(run) == due(STEPS), "no step is missing, none is told twice"
    assert (run / "sae" / "sae.safetensors").exists()


def test_a_killed_rank_is_named_and_the_same_command_goes_on_until_ctrl_c(
    start: Start, experiment: Callable[[str, str], Path], tmp_path: Path
) -> None:
    path, run = experiment("killed", "data"), tmp_path / "runs" / "killed"
    process = start("train", path, "--with-inputs", "--no-progress")
    process.until(behind(run, 1200), seconds=90)  # there is a checkpoint
    os.kill(json.loads((run / "logs" / "alive-rank-1").read_text())["pid"], signal.SIGKILL)
    assert ended(process, run) == 1, process.log
    assert state(run)["state"] == "failed"
    assert "rank 1 was killed (SIGKILL)" in state(run)["error"]

    again = start("train", path, "--no-progress")
    again.until(lambda: state(run)["state"] == "running" and bool(list(run.glob("logs/alive-rank-*"))), seconds=30)
    resumed = told(run)[-1]  # what was told behind the checkpoint is cut off, and told anew
    again.until(behind(run, max(resumed, 1200) + 200), seconds=60)
    again.popen.send_signal(signal.SIGINT)
    assert ended(again, run) == 75, again.log
    assert state(run)["state"] == "interrupted"
    steps = told(run)
    assert steps == due(steps[-1])


def test_the_doctor_adds_up_over_nccl(start: Start) -> None:
    process = start("doctor")
    process.wait(90)
    found = [line for line in process.log.splitlines() if "all-reduce (NCCL, " in line]
    assert len(found) == 1, process.log
    assert found[0].startswith("ok "), process.log
    assert found[0].endswith("B/s past each")
