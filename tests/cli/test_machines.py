"""Two machines, which are two processes here: they find each other by `launch.rendezvous` and train as one."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.runtime.processes import free_port

Plmsae = Callable[..., Any]
Write = Callable[..., Path]


@pytest.fixture
def several() -> str:
    """A `launch` section of two nodes and a port that is free."""
    return f"launch: {{nodes: 2, gpus: 0, patience: 60, rendezvous: '127.0.0.1:{free_port()}'}}\n"


def lines(run: Path) -> list[dict[str, Any]]:
    metrics = run / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


@pytest.mark.slow
def test_two_machines_train_as_one_and_end_together(
    plmsae: Plmsae, start: Callable[..., Any], write: Write, several: str, tmp_path: Path
) -> None:
    alone = write("alone.yaml", evaluation="")
    assert plmsae("train", alone, "--with-inputs").code == 0
    path = write("both.yaml", evaluation="", more=several)
    refused = plmsae("run", path)
    assert refused.code == 1
    assert "is for `plmsae train` alone" in refused.err
    machines = [start("train", path, "--no-progress") for _ in range(2)]
    assert [machine.wait() for machine in machines] == [0, 0], machines[0].log + machines[1].log
    run = tmp_path / "runs" / "both"
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    expected = [line["loss"] for line in lines(tmp_path / "runs" / "alone")]
    assert [line["loss"] for line in lines(run)] == pytest.approx(expected, rel=1e-4)
    assert {"rank-0.log", "rank-1.log"} <= {path.name for path in (run / "logs").iterdir()}


@pytest.mark.slow
def test_ctrl_c_on_one_machine_stops_both_at_one_checkpoint(
    plmsae: Plmsae, start: Callable[..., Any], write: Write, several: str, tmp_path: Path
) -> None:
    assert plmsae("optimize", write("data.yaml"), "--with-inputs").code == 0
    path = write("both.yaml", evaluation="", more=several, tokens=128_000_000)
    run = tmp_path / "runs" / "both"
    machines = [start("train", path, "--no-progress") for _ in range(2)]
    machines[0].until(lambda: len(lines(run)) > 5)
    machines[1].popen.send_signal(signal.SIGINT)
    assert [machine.wait() for machine in machines] == [75, 75], machines[0].log + machines[1].log
    assert all(machine.gone() for machine in machines)
    assert (run / "checkpoints" / f"step-{lines(run)[-1]['step']:08d}").is_dir()
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
