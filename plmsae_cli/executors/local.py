"""The local executor: this machine's GPUs or cores.

One slot works in this very process, several in a pool of warm ones; a task with a gang goes to torchrun.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.executor import fix_plans
from plmsae_cli.executors.pool import Pool
from plmsae_cli.executors.torchrun import launch_gang
from plmsae_cli.executors.worker import Behind, LocalContext
from plmsae_cli.runtime.device import allow_gpus, chosen_gpus
from plmsae_cli.runtime.dist import in_gang
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted, Plan, Task
from plmsae_cli.store.fs import Store


class LocalExecutor:
    """Runs a stage's plan on this machine."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        gpus = chosen_gpus(experiment.launch)
        allow_gpus(gpus)
        wanted = experiment.launch.workers
        self.slots = max(1, len(gpus)) if wanted == "auto" else wanted
        self._gpus = gpus
        self._pool: Pool | None = None

    def run(self, plan: Plan, report: Callable[..., None]) -> None:
        """All tasks of the plan.

        Raises:
            PlanChanged: see there.
            Interrupted, UserError, TaskFailed: as the tasks do.
        """
        fix_plans(plan, Store(self.experiment.storage))
        alone = [t for t in plan.tasks if t.resources.gang == 1]
        if self.slots > 1 and len(alone) > 1:
            if self._pool is None:
                self._pool = Pool(self.experiment, self.slots, self._gpus)
            self._pool.run(alone, report)
            left = [t for t in plan.tasks if t.resources.gang > 1]
        else:
            left = list(plan.tasks)
        if self._gpus and any(t.resources.gpus for t in left):
            self.close()  # idle workers hold models, and what memory they once needed, on those GPUs
        with Behind() as behind:
            self._in_turn(left, sum(t.cost for t in plan.tasks), behind, report)

    def _in_turn(self, left: Sequence[Task], total: float, behind: Behind, report: Callable[..., None]) -> None:
        spent = total - sum(t.cost for t in left)
        for task in left:
            if STOP.requested():
                raise Interrupted

            def within(
                done: float, of: float, *, _base: float = spent, _cost: float = task.cost, **figures: Any
            ) -> None:
                report(_base + _cost * done / max(of, 1e-9), total, **figures)

            if task.resources.gang > 1 and not in_gang():
                launch_gang(task, self.experiment, within)
            else:
                behind.run(task, LocalContext(self.experiment, within))
            spent += task.cost
            report(spent, total)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None
