"""`--bugfix`: a ready experiment for a big machine, cut down and run as it would run there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.bugfix.sizes import STEPS

EXAMPLES = Path(__file__).parents[2] / "experiments" / "examples"


@pytest.mark.slow
def test_an_example_runs_through_with_no_network_no_gpu_and_nothing_but_the_package(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    example = EXAMPLES / "saefold-3b-l36-matryoshka.yaml"
    process = start("run", example, "--bugfix", "--json", CUDA_VISIBLE_DEVICES="", http_proxy="http://127.0.0.1:9")
    assert process.wait() == 0, process.log
    run = tmp_path / "runs" / "bugfix" / example.stem
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], set(status["stage_seconds"])) == (
        "done",
        {"embed", "shuffle", "optimize", "train", "eval"},
    )
    assert "s3://" not in (run / "resolved.yaml").read_text()
    order = json.loads((run / "logs" / "gang.json").read_text())
    assert order["task"]["resources"]["gang"] == 2
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    evaluated = json.loads((run / "eval" / "metrics.json").read_text())
    assert evaluated["architecture"] == "matryoshka_topk"
    assert (run / "report" / "index.html").is_file()
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("process-")) == ["runs"]


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_as_many_ranks_as_the_machine_has_gpus_and_two_at_most(
    monkeypatch: pytest.MonkeyPatch, gpus: int, ranks: int
) -> None:
    from plmsae_cli.cli.stage import load_for

    monkeypatch.setattr("plmsae_cli.runtime.device.visible_gpus", lambda: gpus)
    monkeypatch.setattr("plmsae_cli.runtime.device.installed_gpus", lambda: gpus)
    loaded = load_for(EXAMPLES / "esm2-650m-l24-topk.yaml", None, bugfix=True)
    assert loaded.experiment.launch.ranks == ranks


def test_a_smoke_run_leaves_real_runs_alone_and_has_its_folder_to_itself(
    plmsae: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plmsae_cli.executors.queue import smoke_folder

    monkeypatch.chdir(tmp_path)
    example = EXAMPLES / "esm2-650m-l24-topk.yaml"
    real = tmp_path / "runs" / example.stem / "status.json"
    real.parent.mkdir(parents=True)
    real.write_text("{}")
    with smoke_folder(Path("runs/bugfix")):
        refused = plmsae("run", example, "--bugfix")
    assert refused.code == 4
    assert "another --bugfix" in refused.err
    planned = json.loads(plmsae("train", example, "--bugfix", "--dry-run", "--json").out)
    assert planned["plans"][-1]["artifacts"]["run"]["folder"] == f"runs/bugfix/{example.stem}"
    assert real.read_text() == "{}"
