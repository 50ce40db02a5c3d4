"""sweep: a grid of ordinary runs over one dataset, in one table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors import pipeline
from plmsae_cli.executors.pipeline import Done
from plmsae_cli.report.frontier import frontier
from plmsae_cli.runtime.results import headline
from plmsae_cli.runtime.saved import load_sae, load_sae_with_facts
from plmsae_cli.stages.sweep import table, trials
from plmsae_cli.store.fs import Store
from plmsae_cli.store.lineage import Lineage

Build = Callable[..., Experiment]
Go = Callable[..., Done]
GRID = {"train.sae.k": [2, 6], "train.sae.architecture": ["topk", "matryoshka_topk"]}
POINTS = [{"train.sae.k": k, "train.sae.architecture": kind} for k in (2, 6) for kind in ("topk", "matryoshka_topk")]


def sweep(build: Build, grid: dict[str, list[Any]] = GRID, **changes: Any) -> Experiment:
    return build(**{"sweep.grid": grid, "eval.fidelity.loss_recovered": False, "train.tokens": 640, **changes})


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_points_are_ordinary_experiments_in_the_order_of_the_file(build: Build) -> None:
    experiment = sweep(build, **{"wandb.mode": "offline"})
    found = trials(experiment)
    assert [trial.values for trial in found] == POINTS
    assert len({trial.hash for trial in found}) == 4
    for trial, point in zip(found, POINTS, strict=True):
        own = trial.experiment
        assert own.sweep is None
        assert own.train is not None
        assert (own.train.autoencoder().k, own.train.autoencoder().architecture) == tuple(point.values())
        assert own.stages() == ["embed", "shuffle", "optimize", "train", "eval"]
        assert trial.run == Path(experiment.root) / "run" / "trials" / trial.hash
        assert own.data_folder() == experiment.data_folder()
        assert own.wandb.group == "run"
    # A trial's name depends on its values alone: a grid that grows finds what it has.
    more = trials(sweep(build, {**GRID, "train.sae.k": [2, 4, 6]}))
    assert {trial.hash for trial in found} < {trial.hash for trial in more}


def test_a_grid_shares_one_dataset_and_ends_in_one_table(build: Build, go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[tuple[str, str]] = []
    real = pipeline._stage

    def counted(stage: str, experiment: Experiment, *rest: Any) -> bool:
        worked = real(stage, experiment, *rest)
        if worked:
            stages.append((stage, str(experiment.name)))
        return worked

    monkeypatch.setattr(pipeline, "_stage", counted)
    experiment = sweep(build)
    done = go(experiment)
    assert list(done.stages) == ["embed", "shuffle", "optimize", "sweep"]
    names = [trial.hash for trial in trials(experiment)]
    made = [("embed", "run"), ("shuffle", "run"), ("optimize", "run")]
    assert stages == made + [(stage, name) for name in names for stage in ("train", "eval")]
    assert len(list(Path(experiment.data_folder()).glob("embed-*"))) == 1

    run = done.run.path
    body = read(run / "sweep.json")
    assert body["grid"] == GRID
    assert [row["values"] for row in body["trials"]] == POINTS
    key = Lineage(experiment, Store()).dataset().key
    for row in body["trials"]:
        folder = run / "trials" / row["hash"]
        assert row["state"] == "done"
        assert row["metrics"] == headline(folder)
        assert row["metrics"]["l0_mean"] <= row["values"]["train.sae.k"]
        saved = load_sae_with_facts(folder)
        assert saved.facts["config"]["k"] == row["values"]["train.sae.k"]
        assert saved.facts["config"]["architecture"] == row["values"]["train.sae.architecture"]
        assert saved.facts["dataset"] == key
        assert (folder / "report" / "index.html").exists()
        assert read(folder / "status.json")["state"] == "done"
    assert not (run / "sae").exists(), "the base is not trained"
    page = (run / "report" / "index.html").read_text()
    assert all(row["hash"] in page for row in body["trials"])
    assert read(run / "status.json")["state"] == "done"

    # The frontier: nothing on it is beaten, everything else is.
    points = [(row["metrics"]["l0_mean"], row["metrics"]["fvu"]) for row in body["trials"]]
    best = frontier(points)
    for index, (active, fvu) in enumerate(points):
        beaten = any(a <= active and f <= fvu and (a, f) != (active, fvu) for a, f in points)
        assert (index in best) != beaten
    assert 1 <= len(best) <= 4

    # Again: nothing is done, and the same table stands.
    stages.clear()
    assert go(experiment).stages == {}
    assert stages == []
    assert read(run / "sweep.json") == body

    # One more value: two more trials, the others untouched.
    grown = sweep(build, {**GRID, "train.sae.k": [2, 4, 6]})
    assert list(go(grown).stages) == ["sweep"]
    assert {name for _, name in stages} == {t.hash for t in trials(grown)} - set(names)
    assert len(read(run / "sweep.json")["trials"]) == 6


def test_a_trial_is_the_run_it_would_be_alone(build: Build, go: Go, tmp_path: Path) -> None:
    experiment = sweep(build, {"train.sae.k": [3], "train.seed": [5]})
    run = go(experiment, ["embed", "shuffle", "optimize", "sweep"]).run.path
    (trial,) = trials(experiment)
    alone = go(build(name="alone", train__sae__k=3, train__seed=5, train__tokens=640), ["train"]).run.path
    ours, theirs = load_sae(run / "trials" / trial.hash).state_dict(), load_sae(alone).state_dict()
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_trial_that_fails_does_not_stop_the_others(build: Build, go: Go) -> None:
    experiment = sweep(build, {"train.sae.k": [2, 100_000, 4]})
    with pytest.raises(UserError, match="1 of 3 trials failed"):
        go(experiment)
    run = Path(experiment.root) / "run"
    body = read(run / "sweep.json")
    assert [row["state"] for row in body["trials"]] == ["done", "failed", "done"]
    assert [bool(row["metrics"]) for row in body["trials"]] == [True, False, True]
    failed = run / "trials" / body["trials"][1]["hash"]
    assert "larger than the dictionary" in read(failed / "status.json")["error"]
    assert (run / "report" / "index.html").exists()
    assert read(run / "status.json")["state"] == "failed"
    # What failed is tried again, what is done is not.
    again = sweep(build, {"train.sae.k": [2, 4]})
    assert go(again).stages == {}


def test_the_table_before_anything_ran(build: Build) -> None:
    experiment = sweep(build)
    body = table(experiment, trials(experiment), {})
    assert [row["state"] for row in body["trials"]] == ["pending"] * 4
    assert all(row["metrics"] == {} for row in body["trials"])


def test_a_random_search_is_a_list_of_ordinary_runs(build: Build) -> None:
    space = {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "train.sae.k": [2, 4, 6]}
    experiment = build(**{"sweep.random": {"trials": 6, "space": space}})
    found = trials(experiment)
    assert len({trial.hash for trial in found}) == 6
    for trial in found:
        own = trial.experiment.train
        assert own is not None
        assert (own.lr, own.autoencoder().k) == (trial.values["train.lr"], trial.values["train.sae.k"])
        assert trial.experiment.wandb.group == "run"
    more = trials(build(**{"sweep.random": {"trials": 8, "space": space}}))
    assert [trial.hash for trial in more[:6]] == [trial.hash for trial in found]


def test_optuna_chooses_prunes_and_leaves_one_table(build: Build, go: Go) -> None:
    """Real trainings: rates that learn, then some that do not; what is worse at a checkpoint than the median ends there."""
    pytest.importorskip("optuna")
    search = {
        "trials": 7, "startup_trials": 2, "prune": "median", "seed": 1,
        "space": {"train.lr": {"low": 1e-7, "high": 1e-2, "log": True}},
    }  # fmt: skip
    experiment = build(**{"sweep.optuna": search, "eval": None, "train.tokens": 1280})
    run = go(experiment).run.path
    body = read(run / "sweep.json")
    states = [row["state"] for row in body["trials"]]
    assert len(states) == 7
    assert {"done", "pruned"} == set(states)
    for row in body["trials"]:
        folder = run / "trials" / row["hash"]
        assert read(folder / "status.json")["state"] == row["state"]
        steps = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        assert (steps == 10) == (row["state"] == "done")
        assert (folder / "sae" / "sae.json").exists() == (row["state"] == "done")
    # A larger rate learns faster here, so what was ended has smaller rates than the best that was not.
    rates = {row["values"]["train.lr"]: row["state"] for row in body["trials"]}
    assert max(rate for rate, state in rates.items() if state == "pruned") < max(rates)
    assert go(experiment).stages == {}
    assert read(run / "sweep.json") == body
    assert "7 trials" in (run / "report" / "index.html").read_text()
