"""Trials side by side on one machine: real processes, each with GPUs of its own, and what a stop or a death leaves."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors import box as module
from plmsae_cli.executors.box import Box, places, side_by_side
from plmsae_cli.executors.local import LocalExecutor
from plmsae_cli.executors.pipeline import run_experiment
from plmsae_cli.runtime.progress import PlainReporter
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted
from plmsae_cli.stages.sweep import Trial, trials

Trained = Callable[..., Experiment]
GRID = {"grid": {"train.sae.k": [2, 4, 9999]}}


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, as far as placing goes; a process that is to compute on one finds the CPU."""
    monkeypatch.setattr(module, "chosen_gpus", lambda launch: [0, 1])


def swept(trained: Trained, name: str, sweep: dict[str, Any], **launch: Any) -> Experiment:
    body = trained(name, "box-data", tokens="1_280", **launch).dump()
    return Experiment.model_validate({**body, "sweep": sweep})


def environment(trial: Trial) -> dict[str, Any]:
    return dict(json.loads((trial.run / "environment.json").read_text()))


def test_each_trial_has_a_gpu_of_its_own_and_gives_what_it_gives_alone(
    trained: Trained, gpus: None, losses: Callable[[Experiment], list[float]]
) -> None:
    experiment = swept(trained, "packed", GRID)
    said: list[str] = []
    with pytest.raises(UserError, match="1 of 3 trials failed"):
        run_experiment(experiment, ["sweep"], PlainReporter(said.append))
    found = trials(experiment)
    good = [trial for trial in found if trial.values["train.sae.k"] != 9999]
    seen = [environment(trial)["visible_gpus"] for trial in good]
    assert set(seen) == {"5", "7"}
    assert sum("begins on GPU" in line for line in said) == 3
    table = json.loads((Path(experiment.root) / "packed" / "sweep.json").read_text())["trials"]
    assert [row["state"] for row in table] == ["done", "done", "failed"]
    assert any("larger than the dictionary" in line for line in said), "its error comes back from its process"
    # Bit for bit what the same trial gives in this process, one after the other.
    alone = swept(trained, "alone", {"grid": {"train.sae.k": [4]}}, workers=1)
    run_experiment(alone, ["sweep"], PlainReporter(said.append))
    assert losses(trials(alone)[0].experiment) == losses(good[1].experiment)
    # Again: one is tried again, none of the others.
    before = (good[0].run / "metrics.jsonl").stat().st_mtime_ns
    with pytest.raises(UserError, match="1 of 3 trials failed"):
        run_experiment(experiment, ["sweep"], PlainReporter(said.append))
    assert (good[0].run / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_search_has_several_trials_at_work_and_goes_on_after_a_stop(
    trained: Trained, gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    # Three points for four trials: one is chosen again, perhaps while it is at work.
    space = {"train.sae.k": [2, 4, 8]}
    experiment = swept(trained, "hunted", {"optuna": {"trials": 4, "startup_trials": 2, "seed": 3, "space": space}})
    run = Path(experiment.root) / "hunted"

    def stop_when_two_work() -> None:
        while len(list(run.glob("trials/*/metrics.jsonl"))) < 2:
            time.sleep(0.02)
        STOP.request()

    watcher = threading.Thread(target=stop_when_two_work, daemon=True)
    watcher.start()
    with pytest.raises(Interrupted):
        run_experiment(experiment, ["sweep"], PlainReporter())
    watcher.join(10)
    begun = {path.name for path in run.glob("trials/*") if path.is_dir()}
    assert len(begun) == 2
    assert {json.loads((run / "trials" / name / "environment.json").read_text())["visible_gpus"] for name in begun} == {
        "5",
        "7",
    }
    STOP.asked = False
    run_experiment(experiment, ["sweep"], PlainReporter())
    rows = json.loads((run / "sweep.json").read_text())["trials"]
    assert {row["state"] for row in rows} == {"done"}
    assert {row["hash"] for row in rows[:2]} == begun, "those that were stopped are continued"
    study = (run / "optuna.journal").read_text().splitlines()
    assert sum(json.loads(line)["op_code"] == 4 for line in study) == 4, "four trials were begun, none twice"
    assert all(row["objective"] > 0 for row in rows)

    # Evaluation alone is side by side too.
    scored = Experiment.model_validate({**experiment.dump(), "eval": {"fidelity": {"proteins": 4}}})
    orders: list[tuple[str, list[str]]] = []

    def work(self: Box, trial: Trial, stages: Sequence[str], *_: Any) -> dict[str, Any]:
        orders.append((trial.hash, list(stages)))
        return {"worked": True}

    monkeypatch.setattr(Box, "_work", work)
    assert "eval" in run_experiment(scored, ["eval"], PlainReporter()).stages
    assert sorted(orders) == sorted((row["hash"], ["eval"]) for row in rows)


def test_a_wish_to_stop_while_trials_are_starting_is_no_failure_of_theirs(trained: Trained, gpus: None) -> None:
    """Their processes are still importing: nothing in them can take a signal for a wish."""
    experiment = swept(trained, "early", {"grid": {"train.sae.k": [2, 4, 8]}})
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if "begins on GPU" in text:
            STOP.request()

    with pytest.raises(Interrupted):
        run_experiment(experiment, ["sweep"], PlainReporter(say))
    table = json.loads((Path(experiment.root) / "early" / "sweep.json").read_text())["trials"]
    assert [row["state"] for row in table] == ["pending"] * 3
    assert not any("failed" in line for line in said)


@pytest.mark.parametrize("last_words", ['{"worked": true}', ""])
def test_a_trial_that_had_ended_when_it_was_asked_to_stop_has_ended(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_words: str
) -> None:
    """A signal may come when it has told its outcome, or before it could say a word."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nread order\nprintf '{last_words}'\nkill -TERM $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(program))
    experiment = swept(trained, "late", GRID)
    box = Box([()], tmp_path, PlainReporter())
    if last_words:
        assert box.run(trials(experiment)[0], ["train"])
    else:
        with pytest.raises(Interrupted):
            box.run(trials(experiment)[0], ["train"])


def test_what_cannot_be_recorded_ends_the_sweep_at_once(
    trained: Trained, gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the disk is full, a hundred trials to come would only fill it again."""
    experiment = swept(trained, "full", {"grid": {"train.sae.k": [2, 4, 8, 16, 32]}})
    first = trials(experiment)[0]
    begun: list[str] = []
    over = threading.Event()

    class Ending(PlainReporter):
        def end(self, text: str) -> None:
            over.set()

    def outcome(self: Any, trial: Trial, *_: Any) -> dict[str, Any]:
        """The first has ended at once, the others when the sweep has."""
        begun.append(trial.hash)
        assert trial == first or over.wait(240)
        return {"worked": True}

    def full(trial: Trial, error: str | None) -> None:
        raise OSError(28, "No space left on device", "sweep.json")

    monkeypatch.setattr(Box, "_work", outcome)
    reporter = Ending()
    box = Box([[0], [1]], Path(experiment.root) / "logs", reporter)
    with pytest.raises(OSError, match="No space left"):
        side_by_side(trials(experiment), None, box, LocalExecutor(experiment), reporter, full)
    assert len(begun) <= 3, "what was at work, and what took the place of the first"


@pytest.mark.slow
def test_a_trial_whose_process_dies_is_told_with_its_log(
    trained: Trained, gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = swept(trained, "dying", {"grid": {"train.sae.k": [2, 4]}})
    monkeypatch.setenv("PLMSAE_FAULT", "kill:train.step:step=3")
    said: list[str] = []
    with pytest.raises(UserError, match="2 of 2 trials failed"):
        run_experiment(experiment, ["sweep"], PlainReporter(said.append))
    assert sum("its process died (exit -9); its output is in" in line for line in said) == 2


def test_places(monkeypatch: pytest.MonkeyPatch, trained: Trained) -> None:
    def of(gpus: list[int], **launch: Any) -> list[list[int]]:
        monkeypatch.setattr(module, "chosen_gpus", lambda launch: gpus)
        return [list(place) for place in places(swept(trained, "placed", GRID, **launch))]

    assert of([]) == [[]]
    assert of([], workers=3) == [[], [], []]
    assert of([0, 2, 3]) == [[0], [2], [3]]
    assert of([0, 2, 3], ranks=2) == [[0, 2]]
    assert of([0, 1, 2, 3], ranks=2) == [[0, 1], [2, 3]]
    assert of([0, 1, 2, 3], workers=2) == [[0], [1]]
    assert of([0, 1, 2, 3], executor="slurm") == [[]]


@pytest.mark.slow
def test_nothing_outlives_the_command(trained: Trained, gpus: None, tmp_path: Path) -> None:
    """A parent that is killed takes its trials along, even one that is stopped."""
    import subprocess
    import sys

    experiment = swept(trained, "orphans", {"grid": {"train.sae.k": [2, 4]}}, workers=2)
    body = experiment.dump()
    body["train"]["tokens"] = 12_800_000
    code = (
        "import json, sys; from plmsae_cli.config.experiment import Experiment\n"
        "from plmsae_cli.executors.pipeline import run_experiment\n"
        "from plmsae_cli.runtime.progress import PlainReporter\n"
        "run_experiment(Experiment.model_validate(json.load(sys.stdin)), ['sweep'], PlainReporter())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True)
    assert parent.stdin is not None
    parent.stdin.write(json.dumps(body))
    parent.stdin.close()
    run = Path(experiment.root) / "orphans"
    try:
        end = time.monotonic() + 240
        while len(signs := list(run.glob("trials/*/metrics.jsonl"))) < 2:
            assert parent.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        pids = [json.loads((sign.parent / "status.json").read_text())["pid"] for sign in signs]
        os.kill(pids[0], signal.SIGSTOP)
    finally:
        parent.kill()
        parent.wait()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)
