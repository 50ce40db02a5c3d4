"""The axis `features`: select examples by piece of the rows, merge by share of the latents, gather by piece, write by share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.runtime.task import Context, Result, Task

AXIS = "features"


def plan(scope: Scope) -> tuple[list[Task], Mapping[str, Any]]:
    """The tasks, and figures for people."""
    from plmsae_cli.evaluation.features.planning import figures

    options = scope.options.features
    assert options is not None
    identity = scope.identity(AXIS, options.science())
    first: list[Task] = []
    if options.one_per == "cluster":
        first.append(scope.task(AXIS, identity, "cluster"))
    select = _pieces(scope, identity, "select", options.tasks, 20.0, [*first])
    merge = _pieces(scope, identity, "merge", options.tasks, 2.0, select)
    gather = _pieces(scope, identity, "gather", options.tasks, 20.0, merge)
    write = _pieces(scope, identity, "write", options.tasks, 4.0, [*merge, *gather])
    last = scope.task(AXIS, identity, "finish", _steps([*merge, *write]), of=options.tasks)
    return [*first, *select, *merge, *gather, *write, last], figures(scope, options)


def work(task: Task, scope: Scope, context: Context) -> Result:
    from plmsae_cli.evaluation.features import finish, gather, merge, select, write
    from plmsae_cli.evaluation.features.job import Job

    options = scope.options.features
    assert options is not None
    job = Job(task, scope, options, context)
    step, piece = task.args["step"].partition("-")[0], (task.args.get("index", 0), task.args.get("of", 1))
    if step == "select":
        return Result(select.select(job, *piece, None))
    if step == "merge":
        return Result(merge.merge(job, *piece, job.files("select", "select")))
    merged = job.files("merge", "merge")
    if step == "gather":
        return Result(gather.gather(job, *piece, merged))
    if step == "write":
        return Result(write.write(job, *piece, merged, job.files("gather", "gather"), job.files("gather", "beside")))
    return Result(finish.finish(job, merged, job.files("write", "latents")))


def _pieces(scope: Scope, identity: str, name: str, of: int, cost: float, needs: list[Task]) -> list[Task]:
    return scope.pieces(AXIS, identity, name, of, cost, _steps(needs))


def _steps(tasks: list[Task]) -> list[str]:
    return [task.args["step"] for task in tasks]
