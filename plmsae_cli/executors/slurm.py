"""Tasks on SLURM through submitit: job arrays of a stage's tasks, waited for from where the command was started.

A job that the system ends for its time or its priority is put back into the queue and begins its task again. One that is
killed is reported; the same command fills the gaps.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from plmsae_cli.config.errors import UserError, first_line
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.executor import fix_plans, is_gang, load_extra, report_within, run_far, waves
from plmsae_cli.executors.gang import Gang
from plmsae_cli.executors.rank import far_rank
from plmsae_cli.executors.torchrun import MARGIN_S
from plmsae_cli.runtime.dist import PATIENCE
from plmsae_cli.runtime.processes import PORTS
from plmsae_cli.runtime.run_folder import RunFolder
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted, Plan, Task, TaskFailed
from plmsae_cli.store.fs import Store

LARGEST_ARRAY = 1000
"""SLURM refuses arrays of more than MaxArraySize - 1 jobs, 1,000 unless the cluster was set up otherwise."""
QUEUE_LOOK_S = 20.0
"""Between two questions about a job that waits: one controller answers all of a cluster's users."""
BASE_MEMORY = 2 << 30
"""Bytes of a process beside what its task holds."""


class FarTask:
    """A task as a job: called where it runs; when the job is put back into the queue, the same task again."""

    def __call__(self, task: Mapping[str, Any], experiment: Mapping[str, Any], folder: str) -> Exception | None:
        return run_far(task, experiment, folder)

    def checkpoint(self, *arguments: Any) -> Any:
        """What submitit submits in place of an ended job. A task keeps what is committed, so nothing has to be saved."""
        return load_extra("submitit", "slurm").helpers.DelayedSubmission(self, *arguments)


class FarRank:
    """A rank as a process of a job."""

    def __call__(self, run: str, folder: str, environment: Mapping[str, str]) -> None:
        submitit = load_extra("submitit", "slurm")
        given = os.environ.get("MASTER_PORT")
        place = submitit.helpers.TorchDistributedEnvironment()
        place.export(set_cuda_visible_devices=False, overwrite=True)
        if given is None:  # what every rank has drawn alike, from the job's number, is up to 60,000
            os.environ["MASTER_PORT"] = str(PORTS[place.master_port % len(PORTS)])
        far_rank(run, folder, environment)


def _waiting(number: str) -> str:
    """What a job waits for in the queue; empty where it does not, or SLURM does not say."""
    asked = ["squeue", "--noheader", "--jobs", number, "--format", "%T %r"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    state, _, reason = said.strip().partition(" ")
    return f"job {number} waits in SLURM's queue: {reason}" if state == "PENDING" else ""


class SlurmExecutor:
    """Runs a stage's plan as job arrays: one for the tasks that wait for nothing, one for those that wait for them, ...

    Args:
        cluster: submitit's name for where jobs go; `local` are processes of this machine, for tests.
        poll_seconds: between two looks at the jobs.

    Raises:
        UserError: submitit is not installed, or this machine cannot submit jobs.
    """

    def __init__(self, experiment: Experiment, cluster: str = "slurm", poll_seconds: float = 2.0) -> None:
        self.experiment = experiment
        self._submitit: Any = load_extra("submitit", "slurm")
        self.slots = experiment.launch.slurm.array
        self._poll = poll_seconds
        self._folder = Path(experiment.root).absolute() / str(experiment.name) / "logs" / "slurm"
        self._cluster = cluster
        try:
            self._submitit.AutoExecutor(folder=self._folder, cluster=cluster)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"launch.executor: slurm cannot submit from this machine: {first_line(error)}",
                "start it where `sbatch` works, such as the login node, or use executor: local or ray",
            ) from error

    def run(self, plan: Plan, report: Callable[..., None]) -> None:
        """All tasks of the plan; see `Executor`."""
        fix_plans(plan, Store(self.experiment.storage))
        total, spent = sum(task.cost for task in plan.tasks), 0.0
        for wave in waves(plan.tasks):
            if any(is_gang(task) for task in wave):
                for task in wave:
                    self._gang(task, partial(report_within, report, spent, task.cost, total))
                    spent += task.cost
            else:
                spent = self._wave(wave, spent, total, report)

    def _gang(self, task: Task, report: Callable[..., None]) -> None:
        """One job with a rank a process. Told to leave by the system, it saves and is submitted again.

        Raises:
            Interrupted, UserError, TaskFailed: as the ranks do.
        """
        run, number = RunFolder(task.folders[0]), ""
        while True:
            gang = Gang(run, task, self.experiment, report)
            job = self._submit_gang(task, gang)
            if number:
                report(
                    None, None, note=f"job {number} was told to leave and has saved; submitted again as {job.job_id}"
                )
            number = str(job.job_id)
            asked, waits = time.monotonic(), ""
            try:
                while not (job.done() or gang.failed or gang.interrupted):
                    time.sleep(self._poll)
                    gang.look()
                    if (waits or not gang.begun) and time.monotonic() - asked > QUEUE_LOOK_S:
                        asked, before = time.monotonic(), waits
                        waits = "" if gang.begun else _waiting(number)
                        if waits != before:
                            gang.waits(waits or None)
                    if STOP.requested() and not gang.begun and not job.done():
                        raise Interrupted  # it waits for its turn, or has just begun
            except BaseException:
                job.cancel(check=False)
                raise
            if job.done() and not (gang.failed or gang.interrupted) and job.exception() is None:
                return
            if not gang.interrupted:
                job.cancel(check=False)
            if STOP.requested() or not gang.interrupted:
                gang.end(TaskFailed(task.id, f"job {number} was lost. Its output is in {gang.logs}", lost=True))

    def _submit_gang(self, task: Task, gang: Gang) -> Any:
        launch = self.experiment.launch
        ranks = task.resources.gang // launch.nodes
        jobs = self._ask(task.stage, nodes=launch.nodes, tasks_per_node=ranks, gpus=ranks if task.resources.gpus else 0)
        environment = {**gang.start, PATIENCE: str(launch.patience + MARGIN_S)}
        return jobs.submit(FarRank(), str(gang.run.path), os.getcwd(), environment)

    def _wave(self, wave: Sequence[Task], spent: float, total: float, report: Callable[..., None]) -> float:
        """Submit, wait, report; returns the cost of all that is done."""
        running = self._submit(wave)
        failure: Exception | None = None
        lost = 0
        while running:
            if STOP.requested():
                for job in running:
                    job.cancel(check=False)
                raise Interrupted
            time.sleep(self._poll)
            for job in [job for job in running if job.done()]:
                task = running.pop(job)
                found = self._outcome(job, task)
                if found is None:
                    spent += task.cost
                    report(spent, total)
                    continue
                lost += 1
                failure = failure or found
                if lost > 1:
                    report(None, None, note=f"{task.id} failed too")
        if failure is not None:
            raise failure
        return spent

    def _submit(self, wave: Sequence[Task]) -> dict[Any, Task]:
        """Jobs in arrays, with what the largest task of the wave needs."""
        slurm = self.experiment.launch.slurm
        gpus = max(min(1, task.resources.gpus) for task in wave) if self.experiment.launch.gpus != 0 else 0
        memory = BASE_MEMORY + max(task.resources.memory for task in wave)
        executor = self._ask(wave[0].stage, gpus=gpus, mem_gb=-(-memory // 2**30), slurm_array_parallelism=slurm.array)
        settings, folder = self.experiment.dump(), os.getcwd()
        found: dict[Any, Task] = {}
        for first in range(0, len(wave), LARGEST_ARRAY):
            part = wave[first : first + LARGEST_ARRAY]
            bodies = [task.to_json() for task in part]
            jobs = executor.map_array(FarTask(), bodies, [settings] * len(part), [folder] * len(part))
            found |= dict(zip(jobs, part, strict=True))
        return found

    def _ask(self, stage: str, nodes: int = 1, tasks_per_node: int = 1, gpus: int = 0, **more: Any) -> Any:
        """Submitit's executor for jobs that ask the cluster for this."""
        jobs = self._submitit.AutoExecutor(folder=self._folder, cluster=self._cluster)
        slurm = self.experiment.launch.slurm
        given = {"slurm_partition": slurm.partition, "slurm_account": slurm.account}
        jobs.update_parameters(
            name=f"plmsae-{stage}",
            timeout_min=slurm.time,
            nodes=nodes,
            tasks_per_node=tasks_per_node,
            cpus_per_task=slurm.cpus,
            gpus_per_node=gpus,
            slurm_additional_parameters=dict(slurm.options),
            **{name: value for name, value in given.items() if value is not None},
            **more,
        )
        return jobs

    def _outcome(self, job: Any, task: Task) -> Exception | None:
        try:
            found: Exception | None = job.result()
        except self._submitit.core.utils.FailedJobError as error:  # it failed outside the task
            return TaskFailed(task.id, f"job {job.job_id}: {str(error).splitlines()[-1]}", str(error))
        except self._submitit.core.utils.UncompletedJobError as error:
            return TaskFailed(
                task.id,
                f"job {job.job_id} was lost; the same command fills the gaps. Its output is in {job.paths.stderr}",
                str(error),
                lost=True,
            )
        return found

    def close(self) -> None:
        """Jobs are waited for in `run`; nothing is left to close."""
