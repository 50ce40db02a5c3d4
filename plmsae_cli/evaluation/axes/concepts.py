"""The axis `concepts`: prepare, count by piece, choose on validation, score by piece, report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.runtime.task import Context, Result, Task
from plmsae_cli.store.manifest import read_parts

AXIS = "concepts"


def plan(scope: Scope) -> tuple[list[Task], Mapping[str, Any]]:
    """The tasks, and figures for people."""
    options = scope.options.concepts
    assert options is not None
    scope.require_same_model("remove eval.concepts")
    identity = scope.identity(AXIS, options.science(), {"annotations": scope.content(options.annotations)})
    of = options.tasks
    counts, scores = [f"count-{i}of{of}" for i in range(of)], [f"score-{i}of{of}" for i in range(of)]
    share = {"index": 0, "of": of}

    def task(step: str, needs: list[str], cost: float, **args: Any) -> Task:
        return scope.task(AXIS, identity, step, needs, cost, **args)

    tasks = [task("prepare", [], 1.0)]
    tasks += [task(step, ["prepare"], 20.0 / of, **{**share, "index": i}) for i, step in enumerate(counts)]
    tasks.append(task("choose", ["prepare", *counts], 2.0, counts=counts))
    tasks += [task(step, ["choose"], 8.0 / of, **{**share, "index": i}) for i, step in enumerate(scores)]
    tasks.append(task("report", ["choose", *scores], 2.0, scores=scores))
    return tasks, {
        "annotations": options.annotations,
        "mode": options.mode,
        "nulls": ", ".join(options.nulls) or "none",
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
    wanted = task.args["counts"] if step == "choose" else task.args["scores"]
    parts = read_parts(context.store, scope.folder)
    names = [file.name for one in wanted for file in parts[f"{task.args['stem']}-{one}"].files]
    if step == "choose":
        return Result(outcome.choose_all(scope, prepared, options, names, context))
    return Result(outcome.report(scope, prepared, options, names))
