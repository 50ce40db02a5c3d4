"""Trials on one stream: SAEs that read the same blocks in the same order train in one task; the rest of a trial is ordinary."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from plmsae_cli.config.errors import first_line
from plmsae_cli.config.experiment import Experiment, Launch
from plmsae_cli.executors.box import make_data
from plmsae_cli.executors.executor import Executor
from plmsae_cli.executors.locks import locked
from plmsae_cli.executors.pipeline import plan_stage
from plmsae_cli.executors.placement import Load, allot, memory, place
from plmsae_cli.runtime.device import count_gpus, device_memory
from plmsae_cli.runtime.progress import Reporter, clock
from plmsae_cli.runtime.run_folder import RunFolder, beating, read_json
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted, Plan, Resources, Task
from plmsae_cli.stages.sweep import Trial, trials
from plmsae_cli.store.fs import Store
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import done_tasks

Member = tuple[Trial, Plan]
"""A trial and its ordinary plan of `train`."""
_Stream = tuple[str, int, int, str, int | None]

ORDERS = (
    "epochs after the first are ordered by train.seed: SAEs of different seeds share a stream only within one epoch"
)


def shared_plan(members: Sequence[Member], launch: Launch) -> Plan:
    """One task for each group of SAEs, instead of one for each SAE. Members whose training is done are not in any."""
    streams: dict[_Stream, list[Member]] = {}
    for trial, plan in members:
        if not plan.done:
            streams.setdefault(_stream(trial, plan), []).append((trial, plan))
    gpus = count_gpus(launch)
    loads = [[_load(plan) for _, plan in each] for each in streams.values()]
    counts = allot(loads, _places(launch, gpus))
    tasks: list[Task] = []
    groups: dict[str, Any] = {}
    for (key, each), own, count in zip(streams.items(), loads, counts, strict=True):
        ranks = key[2]
        # Ranks on a CPU share its memory, and one process its cores: there, more groups would only read more.
        capacity = device_memory(launch) // (1 if gpus else ranks)
        for indices in place(own, count if gpus and ranks == 1 else 1, capacity):
            chosen, held = [each[i] for i in indices], memory([own[i] for i in indices])
            tasks.append(_task(chosen, ranks, ranks if gpus else 0, held, sum(own[i].cost for i in indices)))
            groups[f"group {len(tasks)}"] = {
                "place": f"{ranks} ranks" if ranks > 1 else "one GPU" if gpus else "this CPU, one process",
                "memory_per_rank": held,
                "tokens_read": max(plan.figures["tokens"] for _, plan in chosen),
                "SAEs": {trial.hash: f"{trial.title}; {plan.figures['latents']:,} latents" for trial, plan in chosen},
            }
    total = sum(task.cost for task in tasks)
    for number, (task, group) in enumerate(zip(tasks, groups.values(), strict=True)):
        group["share_of_work"] = round(task.cost / total, 3)
        if len(tasks) > 1:
            tasks[number] = replace(task, args={**task.args, "group": f"{number + 1} of {len(tasks)}"})
    figures: dict[str, Any] = {"SAEs": len(members), "streams": len(streams)}
    if len({key[:-1] for key in streams}) < len(streams):
        figures["note"] = ORDERS
    artifacts = {trial.hash: plan.artifacts["run"] for trial, plan in members}
    return Plan("train", tasks, artifacts, {**figures, **groups})


def _stream(trial: Trial, plan: Plan) -> _Stream:
    """What SAEs of one stream agree on: dataset, batch, ranks, loader and, beyond one epoch, the seed that orders the blocks."""
    train, figures = trial.experiment.train, plan.figures
    assert train is not None
    one_epoch = figures["steps"] <= figures["rows"] // figures["batch_tokens"]
    seed = None if one_epoch else train.seed
    return figures["dataset"], figures["batch_tokens"], figures["ranks"], train.loader, seed


def _load(plan: Plan) -> Load:
    figures = plan.figures
    passing = figures["memory_of_step"]
    return Load(figures["parameters"] * figures["tokens"], figures["memory_per_rank"] - passing, passing)


def _places(launch: Launch, gpus: int) -> int:
    """Groups that train at the same time."""
    return gpus if launch.workers == "auto" else min(gpus, launch.workers)


def _task(members: Sequence[Member], ranks: int, gpus: int, held: int, cost: float) -> Task:
    """The lone trainings as one task."""
    lone = members[0][1].tasks[0]
    return Task(
        lone.id,
        lone.stage,
        tuple(str(trial.run) for trial, _ in members),
        (),
        Resources(gpus=gpus, gang=ranks, memory=held),
        cost,
        {"members": [trial.experiment.dump() for trial, _ in members]},
    )


def train_shared(
    experiment: Experiment, run: RunFolder, executor: Executor, reporter: Reporter
) -> tuple[bool, dict[str, str]]:
    """Train what the trials lack, each in its own run folder. A trial that cannot begin is left to its own start.

    Returns:
        Whether anything was trained, and by hash the message of each SAE that failed.

    Raises:
        Interrupted.
    """
    store = Store(experiment.storage)
    members: list[Member] = []
    with ExitStack() as locks:
        for trial in trials(experiment):
            if STOP.requested():
                raise Interrupted
            try:
                make_data(trial.experiment, executor, reporter)  # where it is the trial's own
                member = (trial, plan_stage("train", trial.experiment, store))
                if not member[1].done:
                    locks.enter_context(locked(RunFolder(trial.run)))
                    RunFolder(trial.run).claim_identity(Lineage(trial.experiment, store).run_identity())
                    members.append(member)
            except Interrupted:
                raise
            except Exception:  # its own start meets the same, and says it
                reporter.say(f"trial {trial.hash} ({trial.title}) cannot train with the others")
        if not members:
            return False, {}
        plan = shared_plan(members, experiment.launch)
        for trial, _ in members:
            together = next(len(t.folders) for t in plan.tasks if str(trial.run) in t.folders)
            folder = RunFolder(trial.run)
            folder.begin(trial.experiment, None)
            folder.status(state="running", stage="train", error=None, together=together)
        with beating([RunFolder(trial.run) for trial, _ in members]):
            return True, _run(plan, {str(t.run): t for t, _ in members}, store, executor, reporter)


def _run(plan: Plan, members: dict[str, Trial], store: Store, executor: Executor, reporter: Reporter) -> dict[str, str]:
    """Train the groups; returns the message of each SAE that failed."""
    for number, task in enumerate(plan.tasks, 1):
        named = ", ".join(f"{members[folder].title} ({members[folder].hash})" for folder in task.folders)
        reporter.say(f"group {number}/{len(plan.tasks)}: {len(task.folders)} SAE(s) on one stream: {named}")
    if "note" in plan.figures:
        reporter.say(f"{plan.figures['streams']} streams: {plan.figures['note']}")

    def left(state: str, folders: Sequence[str], **changes: Any) -> None:
        for folder in folders:
            if (read_json(RunFolder(folder).path / "status.json") or {}).get("state") == "running":
                RunFolder(folder).status(state=state, **changes)

    # Groups on different GPUs at once; others one after the other, each with all cores as a lone run has them.
    at_once = executor.slots > 1 and all(task.resources.gpus == 1 for task in plan.tasks)
    with STOP.before_forced_exit(lambda: left("killed", list(members))):
        for tasks in [plan.tasks] if at_once else [[task] for task in plan.tasks]:
            folders = [folder for task in tasks for folder in task.folders]
            begun, failure = time.monotonic(), None
            reporter.begin(f"train {len(folders)} SAEs")
            try:
                executor.run(replace(plan, tasks=tasks), reporter.update)
            except Interrupted:
                reporter.end("stopped")
                left("interrupted", list(members))
                raise
            except Exception as error:
                failure = first_line(error)
            finally:
                seconds = round(time.monotonic() - begun, 2)
                for folder in folders:
                    RunFolder(folder).status(stage_seconds={"train": seconds})
            found = [folder for folder in folders if tasks[0].id in done_tasks(store, folder)]
            left("done", found, stage=None)
            if failure is not None:
                left("failed", folders, error=failure)
            lost = len(folders) - len(found)
            reporter.end(f"{clock(seconds)}, {len(found)} done" + (f", {lost} failed" if lost else ""))
    statuses = {folder: read_json(RunFolder(folder).path / "status.json") for folder in members}
    return {members[f].hash: s["error"] for f, s in statuses.items() if s is not None and s["state"] == "failed"}
