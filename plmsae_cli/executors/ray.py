"""Tasks on Ray Core: a cluster of machines that see the same storage.

Ray only schedules: tasks get paths and settings and give back nothing, so no row passes through its object store. A worker
or node that is lost costs the tasks it had, which Ray begins again elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from plmsae_cli.config.errors import UserError, first_line
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.executor import fix_plans, is_gang, load_extra, report_within, run_far
from plmsae_cli.executors.gang import LOOK_S, Gang
from plmsae_cli.executors.rank import far_rank
from plmsae_cli.executors.ray_room import Amounts, grows, nodes, places, refuse, wait_for_room
from plmsae_cli.executors.torchrun import MARGIN_S
from plmsae_cli.runtime.dist import PATIENCE
from plmsae_cli.runtime.processes import free_port
from plmsae_cli.runtime.run_folder import RunFolder
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted, Plan, Task, TaskFailed
from plmsae_cli.store.fs import Store

AT_A_TIME = 4
"""Tasks handed to Ray for each core of the cluster: enough to keep all busy, few enough to take back quickly."""


class FarRank:
    """A rank as an actor."""

    def address(self) -> tuple[str, int]:
        """Where the first rank can be met: this node, and a port that is free now."""
        return str(load_extra("ray", "ray").util.get_node_ip_address()), free_port()

    def work(self, run: str, folder: str, environment: Mapping[str, str]) -> None:
        far_rank(run, folder, environment)


class RayExecutor:
    """Runs a stage's plan on a Ray cluster: one there is, or one of this machine's cores.

    Raises:
        UserError: Ray is not installed, or no cluster answers.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.ray: Any = load_extra("ray", "ray")
        address = experiment.launch.ray.address
        self._ours = not self.ray.is_initialized()
        try:
            if self._ours:
                # Without an address a driver would join whatever RAY_ADDRESS names.
                options = {"include_dashboard": False} if address is None else {}
                with STOP.keeping_handlers():  # Ray would end a driver at once on SIGTERM
                    self.ray.init(address="local" if address is None else address, log_to_driver=False, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"launch.ray.address: {address} cannot be used: {first_line(error)}",
                "start a cluster with `ray start --head`, name its address, or use address: null for this machine alone",
            ) from error
        found = nodes(self.ray)
        self.slots = max(1, sum(int(node.get("CPU", 0)) for node in found) // experiment.launch.ray.cpus)
        self.has_gpus = experiment.launch.gpus != 0 and any(node.get("GPU", 0) for node in found)
        # `max_calls=0` keeps a worker, and the model in its GPU, for the next task.
        self._work = self.ray.remote(max_calls=0)(run_far)

    def run(self, plan: Plan, report: Callable[..., None]) -> None:
        """All tasks of the plan; see `Executor`."""
        fix_plans(plan, Store(self.experiment.storage))
        alone, gangs = [t for t in plan.tasks if not is_gang(t)], [t for t in plan.tasks if is_gang(t)]
        for task in alone:
            needs = self._needs(task)
            wanted = {"CPU": needs["num_cpus"], "GPU": needs["num_gpus"], "memory": needs["memory"] or 0}
            hint = (
                "lower launch.ray.cpus, shuffle.memory or embed.shard (fixed by the first start), or add a larger node"
            )
            self.check_fits(f"task {task.id} of {task.stage}", wanted, hint)
        settings, folder = self.ray.put(self.experiment.dump()), os.getcwd()
        total = sum(task.cost for task in plan.tasks)
        self._each(alone, settings, folder, total, report)
        spent = sum(task.cost for task in alone)
        for task in gangs:
            self._gang(task, folder, partial(report_within, report, spent, task.cost, total))
            spent += task.cost
        report(spent, total)

    def _each(self, tasks: list[Task], settings: Any, folder: str, total: float, report: Callable[..., None]) -> None:
        """Tasks that one process does each."""
        waiting, spent = sorted(tasks, key=lambda task: -task.cost), 0.0
        done: set[str] = set()
        running: dict[Any, Task] = {}
        failure: Exception | None = None
        while failure is None or running:
            if STOP.requested():
                for reference in running:
                    self.ray.cancel(reference, force=True)
                raise Interrupted
            for task in [t for t in waiting if failure is None and done.issuperset(t.needs)]:
                if len(running) >= AT_A_TIME * self.slots:
                    break
                waiting.remove(task)
                work = self._work.options(name=f"{task.stage}.{task.id}", **self._needs(task))
                running[work.remote(task.to_json(), settings, folder)] = task
            if not running:
                break
            ready, _ = self.ray.wait(list(running), timeout=0.5)
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

    def _gang(self, task: Task, folder: str, report: Callable[..., None]) -> None:
        """Ranks as actors of one placement group. What a lost node took with it begins again from the newest checkpoint.

        Raises:
            Interrupted, UserError, TaskFailed: as the ranks do.
        """
        retries = self.experiment.launch.ray.retries
        for left in range(retries, -1, -1):
            gang = Gang(RunFolder(task.folders[0]), task, self.experiment, report)
            lost = self._ranks(task, gang, folder, again=left < retries)
            if lost is None:
                return
            own = gang.failed_by_itself()
            if own or left == 0 or STOP.requested():
                gang.end(lost, killed=None if own else lost)
            report(None, None, note=f"{lost}; trying again from the newest checkpoint")

    def _ranks(self, task: Task, gang: Gang, folder: str, again: bool) -> TaskFailed | None:
        """Run the ranks; what took one of them away, where one was.

        Args:
            again: after a node was lost, in whose place another may come.
        """
        ray, cpus = self.ray, self.experiment.launch.ray.cpus
        gpus = 1 if task.resources.gpus and self.has_gpus else 0
        bundle = {"CPU": cpus, **({"GPU": 1} if gpus else {})}
        group = ray.util.placement_group([bundle] * task.resources.gang, strategy="PACK")
        ranks: list[Any] = []
        try:
            wait_for_room(ray, group, bundle, task.resources.gang, gang.waits, may_join=again)
            kind = ray.remote(num_cpus=cpus, num_gpus=gpus)(FarRank)
            for number in range(task.resources.gang):
                where = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, number)
                ranks.append(kind.options(scheduling_strategy=where).remote())
            address, port = ray.get(ranks[0].address.remote())
            common = {
                **gang.start,
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(len(ranks)),
                "LOCAL_RANK": "0",
            }
            common[PATIENCE] = str(self.experiment.launch.patience + MARGIN_S)
            waiting = {
                rank.work.remote(str(gang.run.path), folder, {**common, "RANK": str(number)}): number
                for number, rank in enumerate(ranks)
            }
            while waiting:
                for reference in ray.wait(list(waiting), timeout=LOOK_S)[0]:
                    waiting.pop(reference)
                    ray.get(reference)
                gang.look()
            return None
        except ray.exceptions.RayError as error:
            return TaskFailed(task.id, f"a rank was lost: {first_line(error)}", lost=True)
        finally:
            for rank in ranks:
                ray.kill(rank)
            ray.util.remove_placement_group(group)

    def _outcome(self, reference: Any, task: Task) -> Exception | None:
        try:
            found: Exception | None = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            times = self.experiment.launch.ray.retries + 1
            message = f"its worker was lost {times} time(s), the last time so: {first_line(error)}"
            return TaskFailed(task.id, message, str(error), lost=True)
        return found

    def _needs(self, task: Task) -> dict[str, Any]:
        return {
            "num_cpus": self.experiment.launch.ray.cpus,
            "num_gpus": min(1, task.resources.gpus) if self.has_gpus else 0,
            "memory": task.resources.memory or None,
            "max_retries": self.experiment.launch.ray.retries,
        }

    def check_fits(self, what: str, wanted: Amounts, hint: str) -> None:
        """Refuse what Ray would wait for a machine for ever to hold. Raises UserError."""
        if not places(found := nodes(self.ray), wanted) and not grows(self.ray):
            raise refuse(what, wanted, found, hint=hint)

    def close(self) -> None:
        if self._ours:
            self.ray.shutdown()
