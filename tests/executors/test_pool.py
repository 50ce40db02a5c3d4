"""Worker processes: the same bytes as one process makes, and a worker that dies loses one task."""

from __future__ import annotations

import copy
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import plmsae_cli
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors import worker
from plmsae_cli.executors.executor import PlanChanged, fix_plans
from plmsae_cli.executors.local import LocalExecutor
from plmsae_cli.executors.pipeline import plan_stage
from plmsae_cli.executors.pool import Pool
from plmsae_cli.runtime.task import Context, Plan, Resources, Result, Task, TaskFailed
from plmsae_cli.store.fs import Store
from tests.conftest import random_esm2


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.setenv("PLMSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    random_esm2(tmp_path / "weights", num_layers=2, d=16)
    text = gzip.decompress((Path(plmsae_cli.__file__).parent / "data" / "smoke.fasta.gz").read_bytes())
    (tmp_path / "x.fasta").write_bytes(text)
    return _experiment(tmp_path, 1)


def _experiment(folder: Path, workers: int) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "run",
            "root": str(folder / "runs"),
            "data_root": str(folder / f"data-{workers}"),
            "model": {"weights": str(folder / "weights")},
            "embed": {
                "fasta": str(folder / "x.fasta"),
                "layers": [1],
                "holdout": 0.1,
                "dtype": "float32",
                "shard": "80kB",
            },
            "launch": {"gpus": 0, "workers": workers},
        }
    )


@pytest.fixture
def executors() -> Iterator[Any]:
    made: list[LocalExecutor] = []

    def make(experiment: Experiment) -> LocalExecutor:
        made.append(LocalExecutor(experiment))
        return made[-1]

    yield make
    for executor in made:
        executor.close()


class Notes:
    """A reporter that keeps everything."""

    def __init__(self) -> None:
        self.seen: list[tuple[float | None, float | None]] = []
        self.notes: list[str] = []

    def __call__(self, done: float | None, total: float | None, **figures: Any) -> None:
        self.seen.append((done, total))
        self.notes += [str(figures["note"])] if "note" in figures else []


def made(experiment: Experiment) -> list[dict[str, Any]]:
    (manifest,) = Path(experiment.data_folder()).glob("embed-*/MANIFEST.json")
    return sorted(json.loads(manifest.read_text())["files"], key=lambda file: str(file["name"]))


def test_two_workers_write_what_one_process_writes_and_one_that_dies_is_replaced(
    experiment: Experiment, executors: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_stage("embed", experiment, Store())
    assert len(plan.tasks) > 4
    executors(experiment).run(plan, Notes())

    pooled = _experiment(tmp_path, 2)
    plan = plan_stage("embed", pooled, Store())
    seen = Notes()
    monkeypatch.setenv("PLMSAE_FAULT", "kill:embed.shard-00001.begin")
    with pytest.raises(TaskFailed, match=r"shard-00001: its worker died twice \(exit -9\)"):
        executors(pooled).run(plan, seen)
    assert seen.notes == ["shard-00001: its worker died (-9); trying again"]
    monkeypatch.delenv("PLMSAE_FAULT")

    rest = plan_stage("embed", pooled, Store())
    assert {"shard-00001", "finish"} <= {task.id for task in rest.tasks} < {task.id for task in plan.tasks}
    seen = Notes()
    executors(pooled).run(rest, seen)
    shares = [done / total for done, total in seen.seen if done is not None and total]
    assert shares[-1] == pytest.approx(1.0)
    assert plan_stage("embed", pooled, Store()).done
    assert made(pooled) == made(experiment)


def test_a_worker_that_dies_as_it_publishes_beside_the_next_task_loses_nothing_else(
    experiment: Experiment, executors: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executors(experiment).run(plan_stage("embed", experiment, Store()), Notes())
    pooled = _experiment(tmp_path, 2)
    monkeypatch.setenv("PLMSAE_FAULT", "kill:embed.shard-00002.written")
    with pytest.raises(TaskFailed, match=r"its worker died twice \(exit -9\)"):
        executors(pooled).run(plan_stage("embed", pooled, Store()), Notes())
    monkeypatch.delenv("PLMSAE_FAULT")
    rest = plan_stage("embed", pooled, Store())
    assert {"shard-00002", "finish"} <= {task.id for task in rest.tasks}
    executors(pooled).run(rest, Notes())
    assert made(pooled) == made(experiment)


def test_a_worker_that_died_after_it_was_looked_at_is_replaced(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, *_) = plan_stage("embed", experiment, Store()).tasks
    pool, seen = Pool(experiment, 1, ()), Notes()
    process = pool._workers[0].process
    process.kill()
    process.join()
    answers = iter([True])
    monkeypatch.setattr(process, "is_alive", lambda: next(answers, False))
    try:
        pool.run([first], seen)
    finally:
        pool.close()
    assert seen.notes == ["proteins: its worker died (-9); trying again"]
    assert "proteins" not in {task.id for task in plan_stage("embed", experiment, Store()).tasks}


def test_idle_workers_leave_the_gpus_to_a_task_outside_the_pool(
    experiment: Experiment, executors: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would keep the language model there while an SAE trains."""
    pooled = _experiment(tmp_path, 2)
    executor = executors(pooled)
    executor.run(plan_stage("embed", pooled, Store()), Notes())
    workers = [slot.process for slot in executor._pool._workers]
    assert all(process.is_alive() for process in workers)
    alive: list[bool] = []

    def work(task: Task, context: Context) -> dict[str, Result]:
        alive.extend(process.is_alive() for process in workers)
        return {}

    module = ModuleType("training_stage")
    module.work = work  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "training_stage", module)
    monkeypatch.setitem(worker.STAGE_MODULES, "training", "training_stage")
    executor._gpus = 2  # as on a machine with two
    one = Task("one", "training", (str(tmp_path),), resources=Resources(gpus=1))
    executor.run(Plan("training", [one], {}, {}), Notes())
    assert alive == [False, False]


def test_a_plan_that_another_process_fixed_first_is_not_overwritten(experiment: Experiment, executors: Any) -> None:
    plan = plan_stage("embed", experiment, Store())
    (artifact,) = plan.artifacts.values()
    other = {"ranges": [[0, 80]]}
    assert Store().write_once(f"{artifact.folder}/plan.json", json.dumps(other).encode())
    with pytest.raises(PlanChanged):
        executors(experiment).run(plan, Notes())
    assert json.loads((Path(artifact.folder) / "plan.json").read_text()) == other
    # Planned again, it follows.
    again = plan_stage("embed", experiment, Store())
    assert [task.id for task in again.tasks] == ["proteins", "shard-00000", "finish"]
    executors(experiment).run(again, Notes())
    assert plan_stage("embed", experiment, Store()).done


def test_a_plan_that_is_freed_as_it_is_compared_is_planned_again(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_stage("embed", experiment, Store())
    monkeypatch.setattr(Store, "write_once", lambda *_: False)
    with pytest.raises(PlanChanged):
        fix_plans(plan, Store())


def test_task_failures_survive_the_way_between_processes() -> None:
    failure = copy.copy(TaskFailed("t", "m", "trace"))  # by the protocol that pipes use
    assert (failure.task, failure.message, failure.trace, str(failure)) == ("t", "m", "trace", "t: m")
