"""SAEs on several GPUs: groups of near-equal work that fit, each one task on one GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors import shared
from plmsae_cli.executors.shared import shared_plan
from plmsae_cli.runtime.task import Artifact, Plan, Task
from plmsae_cli.stages.sweep import Trial, trials

PARAMETERS = {16: 1_000, 32: 3_000, 64: 2_000, 128: 2_000}


def experiment(folder: Path, **launch: Any) -> Experiment:
    body = {
        "name": "many", "root": str(folder), "launch": launch,
        "train": {"data": "s3://bucket/data", "saes": [{"k": k} for k in PARAMETERS]},
    }  # fmt: skip
    return Experiment.model_validate(body)


def members(many: Experiment, steps: int = 10) -> list[tuple[Trial, Plan]]:
    """Trials with plans as `train` makes them, for a dataset of ten batches."""
    found = []
    for trial in trials(many):
        train = trial.experiment.train
        assert train is not None
        ranks = trial.experiment.launch.ranks
        figures = {
            "dataset": "s3://bucket/data", "rows": 80, "batch_tokens": 8, "steps": steps, "tokens": 8 * steps,
            "ranks": ranks, "parameters": PARAMETERS[train.autoencoder().k], "latents": 7,
            "memory_per_rank": 100, "memory_of_step": 20,
        }  # fmt: skip
        run = Artifact(str(trial.run), trial.hash, False)
        found.append((trial, Plan("train", [Task("train", "train", (str(trial.run),))], {"run": run}, figures)))
    return found


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    def have(number: int, memory: int = 10**9) -> None:
        monkeypatch.setattr(shared, "count_gpus", lambda launch: number)
        monkeypatch.setattr(shared, "device_memory", lambda launch: memory)

    return have


def groups(plan: Plan) -> list[set[str]]:
    return [{Path(folder).name for folder in task.folders} for task in plan.tasks]


def test_each_gpu_gets_a_group_of_near_equal_work(tmp_path: Path, gpus: Any) -> None:
    gpus(2)
    many = experiment(tmp_path)
    plan = shared_plan(members(many), many.launch)
    k16, k32, k64, k128 = (trial.hash for trial in trials(many))
    assert groups(plan) in ([{k32, k16}, {k64, k128}], [{k64, k128}, {k32, k16}])
    assert [task.resources.gpus for task in plan.tasks] == [1, 1]
    assert [plan.figures[f"group {n}"]["share_of_work"] for n in (1, 2)] == [0.5, 0.5]
    assert [task.args["group"] for task in plan.tasks] == ["1 of 2", "2 of 2"]
    assert plan.figures["group 1"]["memory_per_rank"] == 2 * 80 + 20
    named = [[body["name"] for body in task.args["members"]] for task in plan.tasks]
    assert [set(names) for names in named] == groups(plan)


def test_on_a_cpu_one_process_reads_once_unless_memory_forbids(tmp_path: Path, gpus: Any) -> None:
    many = experiment(tmp_path)
    gpus(0)
    assert len(shared_plan(members(many), many.launch).tasks) == 1
    gpus(0, memory=200)
    assert sorted(map(len, groups(shared_plan(members(many), many.launch)))) == [2, 2]


def test_ranks_that_were_asked_for_train_one_group_together(tmp_path: Path, gpus: Any) -> None:
    gpus(4)
    many = experiment(tmp_path, ranks=4)
    (task,) = shared_plan(members(many), many.launch).tasks
    assert (task.resources.gang, task.resources.gpus, len(task.folders)) == (4, 4, 4)


def test_what_is_done_is_in_no_group(tmp_path: Path, gpus: Any) -> None:
    gpus(1)
    many = experiment(tmp_path)
    (first, plan), *rest = members(many)
    left = shared_plan([(first, Plan("train", [], plan.artifacts, plan.figures)), *rest], many.launch)
    assert groups(left) == [{trial.hash for trial, _ in rest}]
    none = shared_plan([(t, Plan("train", [], p.artifacts, p.figures)) for t, p in members(many)], many.launch)
    assert none.done
    assert len(none.artifacts) == 4


def test_another_loader_is_another_stream(tmp_path: Path, gpus: Any) -> None:
    gpus(0)
    body = {
        "name": "many", "root": str(tmp_path), "train": {"data": str(tmp_path / "data"), "sae": {"k": 16}},
        "sweep": {"grid": {"train.loader": ["blocks", "litdata"], "train.lr": [1e-3, 1e-4]}, "stream": "shared"},
    }  # fmt: skip
    many = Experiment.model_validate(body)
    plan = shared_plan(members(many), many.launch)
    blocks, slower, litdata, last = (trial.hash for trial in trials(many))
    assert groups(plan) == [{blocks, slower}, {litdata, last}]
    assert plan.figures["streams"] == 2
    assert "note" not in plan.figures, "it is not the seed that parts them"
