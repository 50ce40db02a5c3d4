"""A share of a stage's tasks, for machines that know nothing of each other: `plmsae embed exp.yaml --tasks 3/40`.

Each takes the tasks whose place in the plan falls to it, and leaves. Nobody waits for anybody: what all need first (the table
of proteins) each makes where it is not there yet, and whoever finds that nothing but the merging is left does it. What a lost
process leaves undone, the same command does. A shuffle with middle passes takes a round a pass: a share leaves when its next
tasks wait for those of others.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.executor import Executor, PlanChanged
from plmsae_cli.executors.local import LocalExecutor
from plmsae_cli.executors.pipeline import plan_stage, wanted_layers
from plmsae_cli.runtime.progress import Reporter, clock
from plmsae_cli.runtime.task import Interrupted, Plan, Task
from plmsae_cli.stages.common import FINISH
from plmsae_cli.store.fs import Store
from plmsae_cli.store.weights import resolve_weights


@dataclass(frozen=True)
class Share:
    """Share `index` of `count`, counted from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """`3/40`. Raises UserError for anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(
                f"--tasks {text} is not a share of the tasks", "write I/N with I from 1 to N, such as --tasks 3/40"
            )
        return cls(int(match[1]), int(match[2]))

    def tasks(self, plan: Plan) -> list[Task]:
        """What this share can do of a plan now: its own tasks, and what they need that is nobody's own (the table of proteins).

        A task that waits for another share's tasks is left for later, and so is the last, which merges.
        """
        by_id: dict[str, list[Task]] = {}
        for task in plan.tasks:
            by_id.setdefault(task.id, []).append(task)
        ready: dict[str, bool] = {}

        def is_ready(name: str) -> bool:
            if name not in ready:  # what is not in the plan is done
                ready[name] = all(
                    (_number(task) is None or self._owns(task)) and all(is_ready(need) for need in task.needs)
                    for task in by_id.get(name, [])
                )
            return ready[name]

        wanted: set[str] = set()
        found = [task.id for task in plan.tasks if self._owns(task) and is_ready(task.id)]
        while found:
            name = found.pop()
            if name in by_id and name not in wanted:
                wanted.add(name)
                found += [need for task in by_id[name] for need in task.needs]
        return [task for task in plan.tasks if task.id in wanted]

    def _owns(self, task: Task) -> bool:
        """Whatever is done already: by the numbers in the task's name, else it is the first's."""
        number = _number(task)
        if number is None:
            return self.index == 1 and task.id != FINISH
        return number % self.count == self.index - 1


def _number(task: Task) -> int | None:
    """3 of `shard-00003`; of `merge1-00002-00001` the sum, so that slices and groups are both spread."""
    numbers = re.findall(r"-(\d+)", task.id)
    return sum(map(int, numbers)) if numbers else None


def run_share(experiment: Experiment, stage: str, share: Share, reporter: Reporter) -> str:
    """Do the share, and the merging if nothing else is left; returns one line that says what is left.

    The run's folder is not touched: only storage is shared.

    Raises:
        UserError, TaskFailed, Interrupted: as the tasks do.
    """
    store = Store(experiment.storage)
    resolve_weights(experiment.model.weights, store)
    begun = time.monotonic()
    reporter.begin(f"{stage} {share.index}/{share.count}")
    executor = LocalExecutor(experiment)
    try:
        done = 0
        while some := _run(experiment, stage, executor, share.tasks, store, reporter):
            done += some  # then the next pass, if the others' part of the one before is done too
        left = _plan(experiment, stage, store)
        if left.tasks and {task.id for task in left.tasks} == {FINISH}:
            _run(experiment, stage, executor, lambda plan: plan.tasks, store, reporter)
            left = _plan(experiment, stage, store)
    except BaseException as error:
        reporter.end("stopped" if isinstance(error, Interrupted) else "failed")
        raise
    finally:
        executor.close()
    reporter.end(f"{clock(time.monotonic() - begun)}, {done} task(s)")
    if left.done:
        return f"{stage} is complete: " + ", ".join(a.folder for a in left.artifacts.values())
    waiting = sum(share._owns(task) for task in left.tasks)
    others = sum(task.id != FINISH for task in left.tasks) - waiting
    if waiting:
        return (
            f"{stage}: {waiting} task(s) of this share wait for {others} of other shares: "
            "start the same command again when those have ended"
        )
    return f"{stage}: {others} task(s) of other shares are left; whoever does the last merges"


def _plan(experiment: Experiment, stage: str, store: Store) -> Plan:
    return plan_stage(stage, experiment, store, wanted_layers(stage, experiment, store))


def _run(
    experiment: Experiment,
    stage: str,
    executor: Executor,
    choose: Callable[[Plan], Sequence[Task]],
    store: Store,
    reporter: Reporter,
) -> int:
    """Run what `choose` takes of the plan; returns how many tasks that were."""
    for _ in range(3):
        plan = _plan(experiment, stage, store)
        chosen = list(choose(plan))
        present = {task.id for task in chosen}
        if not chosen:
            return 0
        tasks = [replace(task, needs=tuple(n for n in task.needs if n in present)) for task in chosen]
        try:
            executor.run(replace(plan, tasks=tasks), reporter.update)
        except PlanChanged:
            continue
        return len(tasks)
    raise AssertionError("plan.json keeps changing")
