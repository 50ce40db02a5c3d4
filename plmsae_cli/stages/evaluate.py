"""Evidence about a trained dictionary: an axis is tasks of its own, the last task merges all into tables beside the run.

`eval/latents.parquet` has one row a latent; `eval/metrics.json` the figures of the run; `report/index.html` shows both. An axis
that is added, or whose options change, is measured alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

from plmsae_cli.config.base import digest
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.runtime.task import Artifact, Context, Plan, Result, Task
from plmsae_cli.stages.common import remaining
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.manifest import read_parts

AXES = ("fidelity", "concepts", "families", "probes", "encode", "contacts", "steering", "features")
"""Fields of the `eval` section, and modules of `evaluation.axes`."""
MERGE = "merge"


def plan(experiment: Experiment, store: Store) -> Plan:
    scope = Scope(experiment, store)
    axes = [name for name in AXES if getattr(scope.options, name) is not None]
    tasks: list[Task] = []
    figures: dict[str, Any] = {"axes": axes}
    for name in axes:
        wanted, shown = _module(name).plan(scope)
        tasks += wanted
        figures |= shown if name == "fidelity" else {f"{name}, {key}": value for key, value in shown.items()}
    identity = digest({"axes": sorted({task.args["stem"] for task in tasks})})
    last = scope.task(MERGE, identity[:8], axes=axes)
    tasks.append(replace(last, needs=tuple(task.id for task in tasks)))
    left = remaining(store, tasks)
    if left and left[-1].id != last.id:  # what an axis measures anew must reach the tables
        left.append(replace(last, needs=tuple(task.id for task in left)))
    return Plan("eval", left, {"run": Artifact(scope.folder, identity, not left)}, figures)


def work(task: Task, context: Context) -> Mapping[str, Result]:
    scope = Scope(context.experiment, context.store)
    # The files are about to be those of this task: the record of another's would be believed if sizes happened to agree.
    for other in read_parts(context.store, scope.folder):
        mine = other.startswith(f"{task.args['axis']}-")
        if mine and (other == task.id or not other.startswith(task.args["stem"])):
            context.store.delete(join(scope.folder, "parts", f"{other}.json"))
    if task.args["axis"] == MERGE:
        from plmsae_cli.evaluation.merging import merge
        from plmsae_cli.runtime.saved import read_sae_facts

        facts = read_sae_facts(scope.folder, context.store)
        return {scope.folder: Result(merge(scope, task.args["axes"], facts))}
    return {scope.folder: _module(task.args["axis"]).work(task, scope, context)}


def _module(axis: str) -> Any:
    """`plan(scope)` -> tasks and figures; `work(task, scope, context)` -> Result."""
    return import_module(f"plmsae_cli.evaluation.axes.{axis}")
