"""What every executor is: a scheduler of a plan's tasks, which meet in storage alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.pool import failure_of
from plmsae_cli.executors.worker import LocalContext, run_task
from plmsae_cli.runtime.device import allow_gpus
from plmsae_cli.runtime.task import Plan, Task
from plmsae_cli.stages.common import read_plan
from plmsae_cli.stages.train import TRAIN
from plmsae_cli.store.fs import Store, is_remote, join


class PlanChanged(Exception):
    """Another process fixed the artifact's plan first: plan again and follow it."""


class Executor(Protocol):
    """Runs the plans of one experiment's stages, wherever it has its workers."""

    slots: int
    """Tasks that can be at work at the same time, as far as is known."""

    def run(self, plan: Plan, report: Callable[..., None]) -> None:
        """All tasks of the plan, each after those it needs.

        Raises:
            PlanChanged: see there.
            Interrupted, UserError, TaskFailed: the first that a task ended with; tasks that were at work end first.
        """

    def close(self) -> None: ...


def open_executor(experiment: Experiment) -> Executor:
    """The executor that `launch.executor` names; packages that only one needs are imported here.

    Raises:
        UserError: its package is not installed, or its cluster does not answer.
    """
    kind = experiment.launch.executor
    if kind == "ray":
        from plmsae_cli.executors.ray import RayExecutor

        return RayExecutor(experiment)
    if kind == "slurm":
        from plmsae_cli.executors.slurm import SlurmExecutor

        return SlurmExecutor(experiment)
    from plmsae_cli.executors.local import LocalExecutor

    return LocalExecutor(experiment)


def is_gang(task: Task) -> bool:
    """Whether ranks work on it together, be there one: they can be asked to save and leave."""
    return task.stage == "train" and task.id == TRAIN


def report_within(
    report: Callable[..., None],
    before: float,
    cost: float,
    total: float,
    done: float | None,
    of: float | None,
    **more: Any,
) -> None:
    """What a task tells of itself, as a part of its plan's `total`."""
    share = None if done is None else before + cost * done / max(of or 1.0, 1e-9)
    report(share, None if share is None else total, **more)


def plain_http(experiment: Experiment) -> str | None:
    """What to say where data pass over a link that everybody on it can read and change."""
    train, embed = experiment.train, experiment.embed
    imported = train and train.imported and train.imported.path
    places = [experiment.data_folder(), train and train.data, imported, embed and embed.fasta, experiment.model.weights]
    address = experiment.storage.endpoint_url or ""
    if not (address.startswith("http://") and any(place and is_remote(place) for place in places)):
        return None
    return f"warning: {address} is plain http (storage.allow_http): whoever is on the way can read and change the data"


def load_extra(module: str, extra: str) -> ModuleType:
    """An optional package, imported when first needed. Raises UserError with the line that installs it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"launch.executor: {extra} needs the package {module}, which is not installed",
            f'pip install "plmsae[{extra}]"',
        ) from error


def fix_plans(plan: Plan, store: Store) -> None:
    """Store each artifact's first choices, which later starts obey.

    Raises:
        PlanChanged: another process stored other ones before.
    """
    for artifact in plan.artifacts.values():
        if artifact.done or artifact.plan is None:
            continue
        body = json.dumps(dict(artifact.plan), sort_keys=True).encode()
        path = join(artifact.folder, "plan.json")
        if not store.write_once(path, body) and read_plan(store, artifact.folder) != json.loads(body):
            raise PlanChanged


def waves(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """The tasks in groups whose needs earlier groups meet, the dearest of each group first."""
    left, done = list(tasks), set[str]()
    while left:
        ready = sorted((task for task in left if done.issuperset(task.needs)), key=lambda task: -task.cost)
        assert ready, "tasks need each other"
        yield ready
        left = [task for task in left if task not in ready]
        done |= {task.id for task in ready}


def run_far(task: Mapping[str, Any], experiment: Mapping[str, Any], folder: str) -> Exception | None:
    """One task in a process of a cluster; returns what it failed with, in a form that every process can read.

    Args:
        folder: where the command was started, since paths may be relative.
    """
    from plmsae_cli.store.memory import BUFFERS

    one = Task.from_json(task)
    try:
        os.chdir(folder)
        own = Experiment.model_validate(experiment)
        if own.launch.gpus == 0:
            allow_gpus([])
        run_task(one, LocalContext(own, lambda *_, **__: None))
    except Exception as error:
        return failure_of(one, error)
    finally:
        BUFFERS.clear()  # the cluster counts a task's memory only while it runs
    return None
