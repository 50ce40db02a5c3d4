"""Evidence about a trained dictionary or about language models: an axis is tasks of its own, the last task merges all into
tables beside the run.

`eval/latents.parquet` has one row a latent; `eval/metrics.json` the figures of the run; `report/index.html` shows both. An axis
that is added, or whose options change, is measured alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

from plmsae_cli.config.base import digest
from plmsae_cli.config.experiment import OF_DICTIONARIES, Experiment
from plmsae_cli.evaluation.frame import EVAL, Scope
from plmsae_cli.runtime.task import Artifact, Context, Plan, Result, Task
from plmsae_cli.stages.common import remaining
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.manifest import read_parts

AXES = (*OF_DICTIONARIES, "lm", "representations")
"""Fields of the `eval` section, and modules of `evaluation.axes`."""
MERGE = "merge"


def plan(experiment: Experiment, store: Store) -> Plan:
    scope = Scope(experiment, store)
    possible = [name for name in AXES if experiment.has_dictionary or name not in OF_DICTIONARIES]
    axes = [name for name in possible if getattr(scope.options, name) is not None]
    by_axis: list[list[Task]] = []
    figures: dict[str, Any] = {"axes": axes}
    for name in axes:
        wanted, shown = _module(name).plan(scope)
        by_axis.append(wanted)
        figures |= shown if name == "fidelity" else {f"{name}, {key}": value for key, value in shown.items()}
    tasks = [task for wanted in by_axis for task in wanted]
    identity = digest({"axes": sorted({task.args["stem"] for task in tasks})})
    planned = {name: [task.id for task in wanted] for name, wanted in zip(axes, by_axis, strict=True)}
    last = scope.task(MERGE, identity[:8], axes=axes, planned=planned)
    tasks.append(replace(last, needs=tuple(task.id for task in tasks)))
    left = _without_other_pieces(store, scope.folder, by_axis, remaining(store, tasks))
    if left and left[-1].id != last.id:  # what an axis measures anew must reach the tables
        left.append(replace(last, needs=tuple(task.id for task in left)))
    return Plan("eval", left, {"run": Artifact(scope.folder, identity, not left)}, figures)


def _without_other_pieces(store: Store, folder: str, by_axis: list[list[Task]], left: list[Task]) -> list[Task]:
    """`left` without the pieces of axes that were finished in another number of pieces: results are the same for any.

    Such an axis's last task is done, and tasks of it are recorded that are not planned. A planned one whose files were lost has
    its record, and is done again.
    """
    recorded = {name.removesuffix(".json") for name in store.list(join(folder, "parts"))}
    undone = {task.id for task in left}
    finished = set()
    for wanted in by_axis:
        stem, planned = wanted[-1].args["stem"], {task.id for task in wanted}
        if wanted[-1].id not in undone and any(name.startswith(f"{stem}-") for name in recorded - planned):
            finished.add(stem)
    kept = [task for task in left if task.args["stem"] not in finished or task.id in recorded]
    ids = {task.id for task in kept}
    return [replace(task, needs=tuple(need for need in task.needs if need in ids)) for task in kept]


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

        facts = read_sae_facts(scope.folder, context.store) if context.experiment.has_dictionary else None
        _delete_leavings(context.store, scope.folder, task.args["planned"])
        return {scope.folder: Result(merge(scope, task.args["axes"], facts))}
    return {scope.folder: _module(task.args["axis"]).work(task, scope, context)}


def _delete_leavings(store: Store, folder: str, planned: Mapping[str, Sequence[str]]) -> None:
    """What other options, proteins and numbers of pieces left of these axes: folders such as `encode/activations` are read as a
    whole. Of `features` files stay: those with answers may lie beside them.
    """
    parts = read_parts(store, folder, known=[name for ids in planned.values() for name in ids])
    for axis, ids in planned.items():
        recorded = {name for name in parts if name.startswith(f"{axis}-")}
        if recorded.issuperset(ids):  # else it was finished in another number of pieces
            for name in recorded.difference(ids):
                store.delete(join(folder, "parts", f"{name}.json"))
                del parts[name]
    known = {file.name for part in parts.values() for file in part.files}
    for axis in planned:
        for name in store.list(join(folder, EVAL, axis)) if axis != "features" else ():
            if join(EVAL, axis, name) not in known:
                store.delete(join(folder, EVAL, axis, name))


def _module(axis: str) -> Any:
    """`plan(scope)` -> tasks and figures; `work(task, scope, context)` -> Result."""
    return import_module(f"plmsae_cli.evaluation.axes.{axis}")
