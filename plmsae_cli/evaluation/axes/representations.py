"""The axis `representations`: one task cuts the splits, one a model embeds and probes, one reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.language_models import NAMED_TASKS, Representations
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.evaluation.models import Scored, scored_models
from plmsae_cli.runtime.task import Context, Result, Task

if TYPE_CHECKING:
    from torch import Tensor

    from plmsae_cli.evaluation.representations.tasks import Labelled

AXIS = "representations"
PREPARE, REPORT = "prepare", "report"


def plan(scope: Scope) -> tuple[list[Task], Mapping[str, Any]]:
    """The tasks, and figures for people."""
    options = scope.options.representations
    assert options is not None
    models = _models(scope, options)
    for model in models:
        _layers(model, options)  # refuses those that it lacks before anything runs
    tables = {task: task for task in options.tasks if task not in NAMED_TASKS}
    inputs = scope.contents(annotations=options.annotations, **tables)
    identity = scope.identity(
        AXIS, options.science(), inputs | {model.name: model.identity for model in models}, of_run=False
    )
    prepare = scope.task(AXIS, identity, PREPARE)
    each = [
        scope.task(AXIS, identity, f"model-{place}", [PREPARE], cost=20.0, model=place) for place in range(len(models))
    ]
    report = scope.task(AXIS, identity, REPORT, [task.args["step"] for task in each])
    return [prepare, *each, report], {"models": [model.name for model in models], "tasks": options.tasks}


def _models(scope: Scope, options: Representations) -> list[Scored]:
    wanted = scope.experiment.language_models(options)
    return scored_models(scope, wanted, "eval.representations.models", encoders=True)


def work(task: Task, scope: Scope, context: Context) -> Result:
    options = scope.options.representations
    assert options is not None
    step = task.args["step"]
    if step == PREPARE:
        return _prepare(scope, options, context)
    return _report(scope, options) if step == REPORT else _probe(task, scope, options, context)


def _prepare(scope: Scope, options: Representations, context: Context) -> Result:
    from plmsae_cli.evaluation.annotations.entries import read_entries
    from plmsae_cli.evaluation.representations.tasks import SPLITS, named_task, prepare, table_task

    entries = [] if options.annotations is None else list(read_entries(scope.store.local(options.annotations)))
    files, about = [], []
    for place, name in enumerate(options.tasks):
        context.check_stop()
        found = named_task(name, entries) if name in NAMED_TASKS else table_task(scope.store.local(name), name)
        kept, how = prepare(
            found, options.max_length, options.proteins, options.residues, options.min_proteins, options.clusters
        )
        columns = {"sequence": kept.sequences, "label": kept.labels, "split": kept.splits}
        files.append(scope.write_table(AXIS, f"tasks/{place}.parquet", columns))
        numbers = {split: kept.splits.count(split) for split in SPLITS}
        about.append({"task": name, "of": kept.of, "regression": kept.regression, "split": how, "proteins": numbers})
    return Result([*files, scope.write_json(AXIS, "tasks.json", {"tasks": about})])


def _read(scope: Scope, place: int, about: Mapping[str, Any]) -> Labelled:
    from plmsae_cli.evaluation.representations.tasks import Labelled

    table = scope.read_table(AXIS, f"tasks/{place}.parquet")
    columns = {name: table[name].to_pylist() for name in ("sequence", "label", "split")}
    return Labelled(
        about["task"], about["of"], about["regression"], columns["sequence"], columns["label"], columns["split"]
    )


def _probe(task: Task, scope: Scope, options: Representations, context: Context) -> Result:
    from plmsae_cli.evaluation.representations.features import layer_features
    from plmsae_cli.evaluation.representations.probes import probe
    from plmsae_cli.runtime.embedding import Embedder

    model = _models(scope, options)[task.args["model"]]
    embedder = Embedder.shared(model.weights, scope.store, options.compute)
    layers = _layers(model, options)
    rows = []
    for place, about in enumerate(scope.read_json(AXIS, "tasks.json")["tasks"]):
        labelled = _read(scope, place, about)
        targets, splits, classes, keep = _targets(labelled)
        features = layer_features(
            embedder, labelled.sequences, layers, keep, options.batch_tokens, context.check_stop, context.progress
        )
        found = []
        for layer, x_RD in features.items():
            context.check_stop()
            own = {split: x_RD[mine_R] for split, mine_R in splits.items()}
            labels = {split: targets[mine_R] for split, mine_R in splits.items()}
            valid, test = probe(own, labels, None if classes is None else len(classes), options.l2)
            found.append({"layer": layer, "valid": valid, "test": test})
        rows.append(
            {**about, "classes": classes, "rows": {s: int(m.sum()) for s, m in splits.items()}, "layers": found}
        )
    parameters = sum(p.numel() for p in embedder.model.parameters())
    body = {"model": model.name, "parameters": parameters, "d": embedder.d, "tasks": rows}
    return Result([scope.write_json(AXIS, f"{task.args['step']}.json", body)])


def _layers(model: Scored, options: Representations) -> list[int]:
    if options.layers == "all":
        return list(range(model.num_layers + 1))
    layers = [layer for layer in options.layers if layer <= model.num_layers]
    if not layers:
        raise UserError(
            f"eval.representations.layers: {model.name} has layers 0 to {model.num_layers}, none of {options.layers}",
            "name one of them, or `all`",
        )
    return layers


def _targets(labelled: Labelled) -> tuple[Tensor, dict[str, Tensor], list[str] | None, list[Tensor] | None]:
    """Labels [R], which rows are of which split, the classes' names (of numbers None), and for residues which are rows."""
    import torch

    from plmsae_cli.evaluation.representations.tasks import SPLITS, UNLABELLED

    keep: list[Tensor] | None = None
    texts, sides = labelled.labels, labelled.splits
    if labelled.of == "residue":
        keep = [torch.tensor([letter != UNLABELLED for letter in text]) for text in labelled.labels]
        sides = [s for s, text in zip(sides, texts, strict=True) for letter in text if letter != UNLABELLED]
        texts = [letter for text in texts for letter in text if letter != UNLABELLED]
    splits = {split: torch.tensor([side == split for side in sides]) for split in SPLITS}
    if labelled.regression:
        return torch.tensor([float(text) for text in texts], dtype=torch.float64), splits, None, keep
    classes = sorted(set(texts))
    return torch.tensor([classes.index(text) for text in texts]), splits, classes, keep


def _report(scope: Scope, options: Representations) -> Result:
    rows = []
    for place in range(len(_models(scope, options))):
        body = scope.read_json(AXIS, f"model-{place}.json")
        tasks = []
        for found in body["tasks"]:
            measure = "spearman" if found["regression"] else "mcc"
            best = max(found["layers"], key=lambda row: row["valid"][measure])  # the first of equals
            scores = [
                {"layer": r["layer"], "valid": r["valid"][measure], "test": r["test"][measure]} for r in found["layers"]
            ]
            tasks.append(
                {
                    "task": found["task"],
                    "layer": best["layer"],
                    "score": best["test"][measure],
                    **best["test"],
                    "layers": scores,
                }
            )
        score = sum(task["score"] for task in tasks) / len(tasks)
        rows.append({**{k: body[k] for k in ("model", "parameters", "d")}, "score": score, "tasks": tasks})
    shared = scope.read_json(AXIS, "model-0.json")["tasks"]
    about = [
        {k: task[k] for k in ("task", "of", "regression", "split", "proteins", "rows", "classes")} for task in shared
    ]
    table = [
        (m["model"], t["task"], r["layer"], r["valid"], r["test"])
        for m in rows
        for t in m["tasks"]
        for r in t["layers"]
    ]
    columns = dict(zip(("model", "task", "layer", "valid", "test"), map(list, zip(*table, strict=True)), strict=True))
    files = [
        scope.write_json(AXIS, "result.json", {"tasks": about, "models": rows}),
        scope.write_table(AXIS, "layers.parquet", columns),
    ]
    return Result(files, {"score": rows[0]["score"]})
