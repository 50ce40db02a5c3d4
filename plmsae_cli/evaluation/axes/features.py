"""The axis `features`: select examples by piece of the rows, merge by share of the latents, gather by piece, write by share.

Concepts and descriptions enter behind the second pass alone: they are in the names of the later steps, so that another choice of
them reads no row again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from plmsae_cli.config.base import digest
from plmsae_cli.evaluation.axes import concepts
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.runtime.task import Context, Result, Task
from plmsae_cli.store.fs import join
from plmsae_cli.store.manifest import read_parts

AXIS = "features"
_LATE = ("concepts", "describe")
"""Options that the two passes do not depend on."""
_PASSES = ("cluster", "select", "merge", "gather")


def plan(scope: Scope) -> tuple[list[Task], Mapping[str, Any]]:
    """The tasks, and figures for people."""
    from plmsae_cli.evaluation.features.planning import figures
    from plmsae_cli.evaluation.features.source import unknown_sequences

    options = scope.options.features
    assert options is not None
    embed = scope.experiment.embed
    if embed is not None and embed.fasta is None and (options.one_per == "cluster" or options.describe is not None):
        raise unknown_sequences()
    science = options.science()
    identity = scope.identity(AXIS, {name: value for name, value in science.items() if name not in _LATE})
    of = options.tasks

    def pieces(name: str, cost: float, needs: list[Task]) -> list[Task]:
        return scope.pieces(AXIS, identity, name, of, cost, _steps(needs))

    first = [scope.task(AXIS, identity, "cluster")] if options.one_per == "cluster" else []
    select = pieces("select", 20.0, first)
    merge = pieces("merge", 2.0, select)
    gather = pieces("gather", 20.0, merge)
    measured = concepts.plan(scope)[0][-1].id if scope.options.concepts is not None and options.concepts else None
    late = digest({"concepts": science["concepts"], "measured": measured})[:8]
    about: list[Task] = []
    if measured is not None:
        about = [
            scope.task(AXIS, identity, f"annotate-{late}", _steps(merge), of=of),
            *pieces(f"count-{late}", 10.0, []),
        ]
        about = [replace(task, needs=(*task.needs, measured)) for task in about]
    write = pieces(f"write-{late}", 4.0, [*merge, *gather, *about[:1]])
    collect = scope.task(AXIS, identity, f"collect-{late}", _steps([*merge, *about]), of=of)
    describe: list[Task] = []
    told = ""
    if options.describe is not None:
        given = scope.contents(descriptions=options.describe.descriptions, predictions=options.describe.predictions)
        told = f"-{digest({**options.describe.science(), **given})[:8]}"
        describe = [scope.task(AXIS, identity, f"describe-{late}{told}", _steps([collect, *write]), of=of)]
    last = scope.task(AXIS, identity, f"finish-{late}{told}", _steps([collect, *write, *describe]), of=of)
    tasks = [*first, *select, *merge, *gather, *about, *write, collect, *describe, last]
    return tasks, {"tasks": len(tasks), **figures(scope, options)}


def _steps(tasks: list[Task]) -> list[str]:
    return [task.args["step"] for task in tasks]


def work(task: Task, scope: Scope, context: Context) -> Result:
    from plmsae_cli.evaluation.features.job import Job
    from plmsae_cli.evaluation.features.steps import run

    options = scope.options.features
    assert options is not None
    step = task.args["step"].partition("-")[0]
    _forget_others(task, scope, step)
    return Result(run(step, Job(task, scope, options, context)))


def _forget_others(task: Task, scope: Scope, step: str) -> None:
    """Delete records of this step under other concepts or descriptions: its files are about to be these."""
    if step in _PASSES:
        return
    stem, mine = task.args["stem"], task.args["step"]
    if "index" in task.args:
        mine = mine.rpartition("-")[0]
    for other in read_parts(scope.store, scope.folder):
        if (
            other.startswith(f"{stem}-{step}-")
            and other != f"{stem}-{mine}"
            and not other.startswith(f"{stem}-{mine}-")
        ):
            scope.store.delete(join(scope.folder, "parts", f"{other}.json"))
