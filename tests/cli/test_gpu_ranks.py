"""A run on two GPUs ends when asked to, and goes on: communicators close although its steps are CUDA graphs."""

from __future__ import annotations

import json
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
STEPS = 6000


def last_step(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


@pytest.mark.parametrize("parallel", ["data", "latents"])
def test_two_gpus_end_at_sigterm_and_resume(
    parallel: str, start: Callable[..., Any], write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(
        f"{parallel}.yaml",
        more="launch: {ranks: 2}\n",
        tokens=128 * STEPS,
        evaluation=f"  parallel: {parallel}\n  kernels: fused\n  dead_tokens: 12800\n",
    )
    run = tmp_path / "runs" / parallel
    process = start("run", path, "--no-progress")
    process.until(lambda: last_step(run) > 200, seconds=300)  # graphs are being replayed
    process.popen.send_signal(signal.SIGTERM)
    try:
        code = process.wait(120)
    except subprocess.TimeoutExpired:
        left = ", ".join(map(str, process.family()))
        pytest.fail(f"HANG: 120 s after SIGTERM processes {left} are alive, last step {last_step(run)}\n{process.log}")
    assert code == 75, process.log
    assert process.gone(), f"HANG: processes {process.family()} outlive the command\n{process.log}"
    stopped = last_step(run)
    assert 200 < stopped < STEPS
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"

    again = start("run", path, "--no-progress")
    try:
        assert again.wait(300) == 0, again.log
    except subprocess.TimeoutExpired:
        pytest.fail(f"HANG: resumed at step {stopped}, stands at {last_step(run)}\n{again.log}")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1)), "no step is missing, none is told twice"
    assert (run / "sae" / "sae.safetensors").exists()
