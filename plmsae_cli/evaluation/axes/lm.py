"""The axis `lm`: a task a model and piece of the proteins, and one that adds up and reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmsae_cli.config.language_models import LanguageModels
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.evaluation.models import Scored, scored_models
from plmsae_cli.runtime.task import Context, Result, Task

AXIS = "lm"
COLUMNS = ("loss", "perplexity", "accuracy", "precision", "recall", "f1", "mcc")


def plan(scope: Scope) -> tuple[list[Task], Mapping[str, Any]]:
    """The tasks, and figures for people."""
    options = scope.options.lm
    assert options is not None
    models = _models(scope, options)
    inputs = {"proteins": _content(scope, options), **{model.name: model.identity for model in models}}
    identity = scope.identity(AXIS, options.science(), inputs, of_run=False)
    pieces = [
        scope.task(AXIS, identity, _piece(options, place, index), cost=10.0, model=place, index=index)
        for place in range(len(models))
        for index in range(options.tasks)
    ]
    report = scope.task(AXIS, identity, "report", [piece.args["step"] for piece in pieces])
    shown = {"models": [model.name for model in models], "proteins": options.bin or options.fasta}
    return [*pieces, report], shown | {"sequences": options.sequences or "all"}


def _piece(options: LanguageModels, model: int, index: int) -> str:
    """A piece's name. Pieces are of packs, so those of another size do not add up to all proteins."""
    size = f"-{options.batch_tokens}" if options.tasks > 1 else ""
    return f"{model}-{index}of{options.tasks}{size}"


def _models(scope: Scope, options: LanguageModels) -> list[Scored]:
    return scored_models(scope, scope.experiment.language_models(options), "eval.lm.models")


def _content(scope: Scope, options: LanguageModels) -> str:
    from plmsae_cli.store.tokens import find_shards, shards_digest

    if options.bin is None:
        assert options.fasta is not None
        return scope.content(options.fasta)
    return shards_digest(scope.store, find_shards(scope.store, options.bin))


def work(task: Task, scope: Scope, context: Context) -> Result:
    options = scope.options.lm
    assert options is not None
    return _report(scope, options) if task.args["step"] == "report" else _score(task, scope, options, context)


def _score(task: Task, scope: Scope, options: LanguageModels, context: Context) -> Result:
    from plmsae_cli.evaluation.language import score, scored_proteins
    from plmsae_cli.runtime.device import compute_dtype, pick_device
    from plmsae_cli.runtime.models import load_plm

    model = _models(scope, options)[task.args["model"]]
    device = pick_device()
    compute = compute_dtype(options.compute, device)
    proteins, tally = scored_proteins(options, scope.store)
    plm = load_plm(model.weights, scope.store, device)
    found = score(
        plm, proteins, options.mask_rate, options.batch_tokens, compute, task.args["index"], options.tasks,
        context.check_stop, context.progress,
    )  # fmt: skip
    body = {
        "counts": found.counts.tolist(),
        "loss": found.loss_G.tolist(),
        "parameters": sum(p.numel() for p in plm.parameters()),
        "compute": str(compute).removeprefix("torch."),
        "proteins": tally,
    }
    return Result([scope.write_json(AXIS, f"{task.args['step']}.json", body)])


def _report(scope: Scope, options: LanguageModels) -> Result:
    import torch

    from plmsae_cli.runtime.masked_scores import MaskedScores

    rows: list[dict[str, Any]] = []
    tally: dict[str, int] = {}
    for place, model in enumerate(_models(scope, options)):
        parts = [scope.read_json(AXIS, f"{_piece(options, place, index)}.json") for index in range(options.tasks)]
        sums = MaskedScores(len(parts[0]["loss"]), torch.device("cpu"))
        for part in parts:
            sums.counts += torch.tensor(part["counts"])
            sums.loss_G += torch.tensor(part["loss"], dtype=torch.float64)
        tally = parts[0]["proteins"]
        figures = sums.figures()
        assert figures is not None
        rows.append(
            {"model": model.name, "parameters": parts[0]["parameters"], "compute": parts[0]["compute"], **figures}
        )
    body = {
        "estimator": f"{100 * options.mask_rate:g} % of the residues, 100 % <mask>, chosen by a hash of the sequence",
        "mask_rate": options.mask_rate,
        "max_length": options.max_length,
        "proteins": tally,
        "models": rows,
    }
    table = {name: [row[name] for row in rows] for name in ("model", "parameters", *COLUMNS, "residues")}
    files = [scope.write_json(AXIS, "result.json", body), scope.write_table(AXIS, "models.parquet", table)]
    return Result(files, {"loss": rows[0]["loss"]})
