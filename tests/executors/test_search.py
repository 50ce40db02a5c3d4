"""A search by Optuna: it resumes as if it had not been stopped, ends what is bad, and leaves ordinary runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.search import explore
from plmsae_cli.executors.study import JOURNAL, open_study, summary
from plmsae_cli.executors.watching import Watched
from plmsae_cli.runtime.progress import NoReporter, PlainReporter
from plmsae_cli.runtime.run_folder import RunFolder
from plmsae_cli.runtime.task import Interrupted
from plmsae_cli.stages.sweep import Trial, trials

pytest.importorskip("optuna")
SPACE = {
    "train.lr": {"low": 1e-5, "high": 1e-1, "log": True},
    "train.sae.k": [4, 8, 16],
    "train.seed": {"low": 0, "high": 9},
}


def experiment(folder: Path, **options: Any) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "hunt", "root": str(folder), "embed": {"fasta": "a.fasta", "layers": [1]}, "shuffle": {}, "optimize": {},
            "train": {}, "sweep": {"optuna": {"space": SPACE, **options}},
        }
    )  # fmt: skip


def bowl(trial: Trial) -> float:
    """Least, 0, at a rate of 1e-3 and k = 8."""
    values = trial.values
    return abs(math.log10(values["train.lr"]) + 3) + abs(math.log2(values["train.sae.k"]) - 3)


def hunt(one: Experiment, attempt: Callable[..., float]) -> dict[str, Any]:
    run = RunFolder(Path(one.root) / "hunt")
    study = open_study(one, run.path)
    explore(one, study, run, PlainReporter(), attempt)
    found = json.loads((run.path / "sweep.json").read_text())
    assert found == summary(one, study)
    return dict(found)


def test_a_search_that_was_stopped_chooses_what_it_would_have(tmp_path: Path) -> None:
    order: dict[str, list[Any]] = {"whole": [], "stopped": []}

    def attempt(name: str, stop_at: int | None) -> Callable[..., float]:
        def run(trial: Trial, tell: Callable[[int, float], None]) -> float:
            if len(order[name]) == stop_at:
                raise Interrupted
            order[name].append(dict(trial.values))
            return bowl(trial)

        return run

    whole = hunt(experiment(tmp_path / "a", trials=12), attempt("whole", None))
    with pytest.raises(Interrupted):
        hunt(experiment(tmp_path / "b", trials=12), attempt("stopped", 7))
    journal = tmp_path / "b" / "hunt" / JOURNAL
    with journal.open("a") as file:
        file.write('{"op_code": 4, "wor')  # what a process that was killed may leave
    stopped = hunt(experiment(tmp_path / "b", trials=12), attempt("stopped", None))
    assert order["whole"] == order["stopped"]
    assert [each["hash"] for each in whole["trials"]] == [each["hash"] for each in stopped["trials"]]
    assert [each["state"] for each in stopped["trials"]] == ["done"] * len(stopped["trials"])
    # Again: nothing is left; more trials go on where it ended.
    assert hunt(experiment(tmp_path / "b", trials=12), attempt("stopped", 0)) == stopped
    hunt(experiment(tmp_path / "b", trials=14), attempt("stopped", None))
    assert len(order["stopped"]) == 14
    # It learns: what is chosen is better, on average, than what was drawn at the start.
    scores = [abs(math.log10(p["train.lr"]) + 3) + abs(math.log2(p["train.sae.k"]) - 3) for p in order["stopped"]]
    assert sum(scores[5:]) / 9 < sum(scores[:5]) / 5
    # Names come from the values alone, so `ls`, `eval` and `compare` find them.
    one = experiment(tmp_path / "b", trials=14)
    assert {trial.hash for trial in trials(one)} >= {each["hash"] for each in stopped["trials"]}


def test_a_kill_while_half_a_line_is_dropped_loses_no_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = experiment(tmp_path, trials=3)
    hunt(one, lambda trial, tell: bowl(trial))
    journal = tmp_path / "hunt" / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "wor')

    def killed(path: Path, data: bytes) -> int:
        path.open("wb").close()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Path, "write_bytes", killed)
        open_study(one, journal.parent)
    open_study(one, journal.parent)
    assert journal.read_bytes().startswith(whole)


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_what_is_worse_than_the_median_ends_early(tmp_path: Path, goal: str) -> None:
    """FVU is the worse the larger, whatever the search is after."""
    one = experiment(tmp_path, trials=8, prune="median", startup_trials=3, direction=goal)
    told: list[float] = []

    def attempt(trial: Trial, tell: Callable[[int, float], None]) -> float:
        level = 0.2 if len(told) < 3 else 0.9 if len(told) == 3 else 0.1
        told.append(level)
        tell(100, level)
        return level if goal == "minimize" else -level

    body = hunt(one, attempt)
    states = [each["state"] for each in body["trials"]]
    assert states == ["done", "done", "done", "pruned", *["done"] * (len(states) - 4)]
    pruned = tmp_path / "hunt" / "trials" / body["trials"][3]["hash"] / "status.json"
    assert json.loads(pruned.read_text())["state"] == "pruned"
    assert body["trials"][3]["objective"] is None
    assert all(each["objective"] is not None for each in body["trials"] if each["state"] == "done")
    assert body["trials"][3]["hash"] not in {trial.hash for trial in trials(one)}


def test_failures_are_told_apart_from_a_broken_machine(tmp_path: Path) -> None:
    seen: list[Trial] = []

    def attempt(trial: Trial, tell: Callable[[int, float], None]) -> float:
        seen.append(trial)
        if len(seen) in (2, 4):
            raise UserError("the loss was nan")
        if len(seen) > 5:
            raise UserError("no space left on device")
        return bowl(trial)

    one = experiment(tmp_path, trials=20)
    with pytest.raises(UserError, match="the last 3 trials failed"):
        hunt(one, attempt)
    body = json.loads((tmp_path / "hunt" / "sweep.json").read_text())
    assert [each["state"] for each in body["trials"]] == ["done", "failed", "done", "failed", "done", *["failed"] * 3]
    other = experiment(tmp_path, trials=20, metric="loss")
    with pytest.raises(UserError, match="another space, metric or direction"):
        hunt(other, attempt)


def test_a_curve_that_is_cut_back_while_somebody_looks_is_followed_on(tmp_path: Path) -> None:
    """A trial that was killed begins again at its checkpoint: the lines after it go, and come again with other times."""
    told: list[tuple[int, float]] = []
    train = Experiment.model_validate(
        {"embed": {"fasta": "x", "layers": [1]}, "shuffle": {}, "optimize": {}, "train": {"checkpoint_every": 4}}
    ).train
    assert train is not None
    watched = Watched(NoReporter(), tmp_path, train, lambda step, value: told.append((step, value)))

    def write(last: int, seconds: float) -> None:
        lines = [
            json.dumps({"step": s, "fvu": 1 / s, "seconds": seconds if s > 4 else 1.0}) for s in range(1, last + 1)
        ]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    means = [sum(1 / s for s in steps) / 4 for steps in (range(1, 5), range(5, 9), range(9, 13))]
    write(6, 1.0)
    watched.look()
    write(4, 1.0)
    watched.look()
    write(8, 22.75)
    watched.look()
    write(12, 22.75)
    watched.look()
    assert told == [(4, pytest.approx(means[0])), (8, pytest.approx(means[1])), (12, pytest.approx(means[2]))]

    write(16, 1.0)  # written anew in between, and of another length: where it was read to is no start of a line
    watched.look()
    assert [step for step, _ in told] == [4, 8, 12, 16]
