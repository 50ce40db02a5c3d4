"""Tasks on Ray Core: a cluster of machines that see the same storage.

Ray only schedules: tasks get paths and settings and give back nothing, so no row passes through its object store. A worker
or node that is lost costs the tasks it had, which Ray begins again elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from plmsae_cli.config.errors import UserError, first_line
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.executor import fix_plans, load_extra, run_far
from plmsae_cli.executors.pool import TaskFailed
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted, Plan, Task
from plmsae_cli.store.fs import Store

AT_A_TIME = 4
"""Tasks handed to Ray for each core of the cluster: enough to keep all busy, few enough to take back quickly."""


class RayExecutor:
    """Runs a stage's plan on a Ray cluster: one there is, or one of this machine's cores.

    Raises:
        UserError: Ray is not installed, or no cluster answers.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self._ray: Any = load_extra("ray", "ray")
        address = experiment.launch.ray.address
        self._ours = not self._ray.is_initialized()
        try:
            if self._ours:
                # Without an address a driver would join whatever RAY_ADDRESS names.
                options = {"include_dashboard": False} if address is None else {}
                self._ray.init(address="local" if address is None else address, log_to_driver=False, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"launch.ray.address: {address} cannot be used: {first_line(error)}",
                "start a cluster with `ray start --head`, name its address, or use address: null for this machine alone",
            ) from error
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        self.slots = max(1, sum(int(node.get("CPU", 0)) for node in nodes) // experiment.launch.ray.cpus)
        self._nodes = nodes
        self._gpus = experiment.launch.gpus != 0 and any(node.get("GPU", 0) for node in nodes)
        # `max_calls=0` keeps a worker, and the model in its GPU, for the next task.
        self._work = self._ray.remote(max_calls=0)(run_far)

    def run(self, plan: Plan, report: Callable[..., None]) -> None:
        """All tasks of the plan; see `Executor`."""
        fix_plans(plan, Store(self.experiment.storage))
        for task in plan.tasks:
            self._check_fits(task)
        settings, folder = self._ray.put(self.experiment.dump()), os.getcwd()
        waiting = sorted(plan.tasks, key=lambda task: -task.cost)
        total, spent = sum(task.cost for task in plan.tasks), 0.0
        done: set[str] = set()
        running: dict[Any, Task] = {}
        failure: Exception | None = None
        while failure is None or running:
            if STOP.requested():
                for reference in running:
                    self._ray.cancel(reference, force=True)
                raise Interrupted
            for task in [t for t in waiting if failure is None and done.issuperset(t.needs)]:
                if len(running) >= AT_A_TIME * self.slots:
                    break
                waiting.remove(task)
                work = self._work.options(name=f"{task.stage}.{task.id}", **self._needs(task))
                running[work.remote(task.to_json(), settings, folder)] = task
            if not running:
                break
            ready, _ = self._ray.wait(list(running), timeout=0.5)
            for reference in ready:
                task = running.pop(reference)
                found = self._outcome(reference, task)
                if found is None:
                    done.add(task.id)
                    spent += task.cost
                    report(spent, total)
                else:
                    failure = failure or found
        if failure is not None:
            raise failure

    def _outcome(self, reference: Any, task: Task) -> Exception | None:
        try:
            found: Exception | None = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            times = self.experiment.launch.ray.retries + 1
            message = f"its worker was lost {times} time(s), the last time so: {first_line(error)}"
            return TaskFailed(task.id, message, str(error))
        return found

    def _needs(self, task: Task) -> dict[str, Any]:
        return {
            "num_cpus": self.experiment.launch.ray.cpus,
            "num_gpus": min(1, task.resources.gpus) if self._gpus else 0,
            "memory": task.resources.memory or None,
            "max_retries": self.experiment.launch.ray.retries,
        }

    def _check_fits(self, task: Task) -> None:
        """Ray would wait for ever for a machine that can hold a task that none can."""
        needs = self._needs(task)
        wanted = {"CPU": needs["num_cpus"], "GPU": needs["num_gpus"], "memory": needs["memory"] or 0}
        if any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in self._nodes):
            return
        most = {name: max((node.get(name, 0) for node in self._nodes), default=0) for name in wanted}
        listed = ", ".join(
            f"{name} {amount:,.0f} (most on one node {most[name]:,.0f})" for name, amount in wanted.items()
        )
        raise UserError(
            f"no node of the Ray cluster can hold task {task.id} of {task.stage}: it asks for {listed}",
            "lower launch.ray.cpus, shuffle.memory or embed.shard (fixed by the first start), or add a larger node",
        )

    def close(self) -> None:
        if self._ours:
            self._ray.shutdown()
