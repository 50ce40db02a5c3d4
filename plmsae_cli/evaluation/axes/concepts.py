"""The axis `concepts`: prepare, count by piece, choose on validation, score by piece, report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.runtime.task import Context, Result, Task

AXIS = "concepts"


def plan(scope: Scope) -> tuple[list[Task], Mapping[str, Any]]:
    """The tasks, and figures for people."""
    from plmsae_cli.evaluation.annotations.entries import read_entries

    options = scope.options.concepts
    assert options is not None
    scope.require_same_model("remove eval.concepts")
    # A file that cannot be read is known before training.
    next(read_entries(scope.store.local(options.annotations)), None)
    identity = scope.identity(AXIS, options.science(), scope.contents(annotations=options.annotations))
    counting = scope.pieces(AXIS, identity, "count", options.tasks, 20.0, ["prepare"])
    scoring = scope.pieces(AXIS, identity, "score", options.tasks, 8.0, ["choose"])
    counts, scores = ([task.args["step"] for task in tasks] for tasks in (counting, scoring))
    tasks = [
        scope.task(AXIS, identity, "prepare"),
        *counting,
        scope.task(AXIS, identity, "choose", ["prepare", *counts], 2.0, counts=counts),
        *scoring,
        scope.task(AXIS, identity, "report", ["choose", *scores], 2.0, scores=scores),
    ]
    return tasks, {
        "annotations": options.annotations,
        "mode": options.mode,
        "nulls": ", ".join(options.nulls) or "none",
        "memory_bytes": int(options.memory),
    }


def work(task: Task, scope: Scope, context: Context) -> Result:
    options = scope.options.concepts
    assert options is not None
    step = task.args["step"].partition("-")[0]
    if step == "prepare":
        from plmsae_cli.evaluation.concepts.prepared import prepare

        return Result(prepare(scope, options))
    from plmsae_cli.evaluation.concepts import counting, outcome, scoring
    from plmsae_cli.evaluation.concepts.prepared import load
    from plmsae_cli.evaluation.concepts.sources import open_sources

    prepared = load(scope)
    if step in ("count", "score"):
        with open_sources(scope, options.nulls, options.batch_tokens, context.check_stop) as sources:
            index, of = task.args["index"], task.args["of"]
            if step == "count":
                files = counting.count(scope, prepared, sources, index, of, int(options.memory), context)
            else:
                files = scoring.score(scope, prepared, sources, index, of, context)
        return Result(files)
    if step == "choose":
        names = scope.files_of(task, task.args["counts"])
        return Result(outcome.choose_all(scope, prepared, options, names, context))
    return Result(outcome.report(scope, prepared, options, scope.files_of(task, task.args["scores"])))
