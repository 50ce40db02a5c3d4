"""Shares of a plan, done by processes that know nothing of each other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.local import LocalExecutor
from plmsae_cli.executors.pipeline import plan_stage
from plmsae_cli.executors.share import Share, run_share
from plmsae_cli.runtime.progress import PlainReporter
from plmsae_cli.runtime.task import Plan, Task
from plmsae_cli.stages.common import FINISH
from plmsae_cli.store.fs import Store

COMMAND = [sys.executable, "-c", "from plmsae_cli.cli.app import main; main()"]


def start(path: Path, stage: str, share: str, fault: str | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    environment |= {} if fault is None else {"PLMSAE_FAULT": fault}
    return subprocess.Popen(
        [*COMMAND, stage, str(path), "--tasks", share], text=True, stderr=subprocess.PIPE, env=environment
    )


def test_three_processes_of_which_two_are_killed_and_a_second_round(
    prepared: Callable[..., Experiment], files: Callable[..., Any], reference: dict[str, Any], tmp_path: Path
) -> None:
    experiment = prepared("shares")
    path = tmp_path / "shares.yaml"
    path.write_text(json.dumps({**experiment.dump(), "root": str(tmp_path / "runs")}))
    faults = {2: "kill:embed.shard-00001.begin", 3: "kill:embed.shard-00002.written"}
    first = {i: start(path, "embed", f"{i}/3", faults.get(i)) for i in range(1, 4)}
    told = {i: process.communicate()[1] for i, process in first.items()}
    codes = {i: process.returncode for i, process in first.items()}
    assert codes == {1: 0, 2: -signal.SIGKILL, 3: -signal.SIGKILL}, told
    left = {task.id for task in plan_stage("embed", experiment, Store()).tasks}
    assert {"shard-00001", "shard-00002", FINISH} <= left
    assert not files(experiment)
    second = {i: start(path, "embed", f"{i}/3") for i in (2, 3)}
    told = {i: process.communicate()[1] for i, process in second.items()}
    assert [process.returncode for process in second.values()] == [0, 0], told
    assert any("embed is complete" in text for text in told.values())
    assert not (tmp_path / "runs" / "shares").exists(), "only storage is shared"

    said = Said()
    for stage in ("shuffle", "optimize"):
        for index in (3, 1, 2):
            said.lines.append(run_share(experiment, stage, Share(index, 3), said))
    assert said.lines[0].startswith("shuffle: ")
    assert said.lines[2].startswith("shuffle is complete: ")
    assert said.lines[5].startswith("optimize is complete: ")
    assert files(experiment) == reference


class Said(PlainReporter):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []


@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_task_but_the_last_belongs_to_one_share(prepared: Callable[..., Experiment], count: int) -> None:
    plan = plan_stage("embed", prepared("whole"), Store())
    own = [[t.id for t in Share(i, count).tasks(plan) if Share(i, count)._owns(t)] for i in range(1, count + 1)]
    assert sorted(name for names in own for name in names) == sorted({task.id for task in plan.tasks} - {FINISH})


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/2", "1/2/3", "1/2 --bugfix"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(UserError, match="is not a share"):
        Share.parse(text)


def test_a_share_leaves_what_waits_for_others_and_makes_what_is_nobodys() -> None:
    """Three levels, as a shuffle with a middle pass has, behind a table that all need."""
    table = Task("table", "shuffle", ("x",))
    maps = [Task(f"map-{i:05d}", "shuffle", ("x",), needs=("table",)) for i in range(2)]
    names = ("map-00000", "map-00001")
    merges = [Task(f"merge1-{i:05d}-00000", "shuffle", ("x",), needs=names) for i in range(4)]
    free = Task("free-0", "shuffle", ("x",), needs=tuple(task.id for task in merges))
    finish = Task(FINISH, "shuffle", ("x",), needs=(free.id,))
    whole = [table, *maps, *merges, free, finish]

    def chosen(index: int, tasks: list[Task], count: int = 2) -> list[str]:
        return [task.id for task in Share(index, count).tasks(Plan("shuffle", tasks, {}, {}))]

    assert chosen(1, whole) == ["table", "map-00000"]
    assert chosen(2, whole) == ["table", "map-00001"]
    assert chosen(1, whole, 1) == [task.id for task in whole[:-1]]
    assert chosen(1, [maps[1], *merges, free, finish]) == []
    assert chosen(1, [*merges, free, finish]) == ["merge1-00000-00000", "merge1-00002-00000"]
    assert chosen(2, [*merges, free, finish]) == ["merge1-00001-00000", "merge1-00003-00000"]
    assert chosen(1, [free, finish]) == ["free-0"]
    assert chosen(2, [finish]) == []


def test_middle_passes_are_spread_over_shares_in_rounds(
    prepared: Callable[..., Experiment],
    files: Callable[..., Any],
    reference: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body = prepared("rounds").dump()
    experiment = Experiment.model_validate(body | {"shuffle": {"seed": 3, "memory": "6kB"}})
    run_share(experiment, "embed", Share(1, 1), Said())
    done: dict[int, list[str]] = {1: [], 2: []}
    run = LocalExecutor.run
    turn = 0

    def watched(executor: LocalExecutor, plan: Plan, update: Any) -> None:
        done[turn].extend(task.id for task in plan.tasks if task.id != FINISH)
        run(executor, plan, update)

    monkeypatch.setattr(LocalExecutor, "run", watched)
    everything = {task.id for task in plan_stage("shuffle", experiment, Store()).tasks} - {FINISH}
    assert {name.partition("-")[0] for name in everything} == {"map", "merge1", "free"}
    told = []
    for turn in (2, 1, 2, 1):
        told.append(run_share(experiment, "shuffle", Share(turn, 2), Said()))
    assert "start the same command again" in told[0]
    assert told[-1].startswith("shuffle is complete")
    assert sorted(done[1] + done[2]) == sorted(everything), "each is done once"
    for share in (1, 2):
        assert sum(name.startswith("merge1") for name in done[share]) >= len(everything) // 5
    run_share(experiment, "optimize", Share(1, 1), Said())
    ((blocks, ours),) = ((k, v) for k, v in files(experiment).items() if k.startswith("optimize"))
    assert ours == reference[blocks]
