"""What the axes about language models found, for the page and the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from plmsae_cli.report.cells import Cell, Figure, Section, Table, decimal, text, whole
from plmsae_cli.report.svg import draw, stroke
from plmsae_cli.report.words import clean, count, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def language_models(body: Mapping[str, Any]) -> Section:
    """The section of the axis `lm`."""
    tally = body["proteins"]
    cut = f" {count(tally['cut'])} were cut to {count(body['max_length'])} residues." if tally["cut"] else ""
    lead = (
        f"Every model predicts the same masked residues of {count(tally['used'])} proteins ({body['estimator']}).{cut}"
        " Precision, recall and F1 are weighted by how often each residue occurs; all are of one confusion matrix."
    )
    columns = [("Model", False), ("Parameters", True), ("Loss, nats", True), ("Perplexity", True), ("Accuracy", True),
               ("Precision", True), ("Recall", True), ("F1", True), ("MCC", True), ("Residues", True)]  # fmt: skip
    rows = [
        [
            text(row["model"]), whole(row["parameters"]), decimal(row["loss"], 4), decimal(row["perplexity"], 2),
            *(decimal(row[name]) for name in ("accuracy", "precision", "recall", "f1", "mcc")), whole(row["residues"]),
        ]
        for row in body["models"]
    ]  # fmt: skip
    return Section(
        "lm", "How well language models predict hidden residues", lead, [], [("Models", Table(columns, rows))]
    )


def representations(body: Mapping[str, Any]) -> Section:
    """The section of the axis `representations`."""
    lead = (
        "Linear probes on frozen activations of every layer, trained on one part of the proteins. The layer is chosen on a second"
        " part and scored on a third. Classes: Matthews' coefficient; numbers: Spearman's rank correlation; 0 is chance."
    )
    names = [task["task"] for task in body["tasks"]]
    columns = [("Model", False), ("Parameters", True), ("Mean", True)]
    columns += [(clean(_short(name), 30), True) for name in names]
    rows = [
        [
            text(model["model"]), whole(model["parameters"]), decimal(model["score"]),
            *(Cell(f"{task['score']:.3f} (layer {task['layer']})", repr(task["score"])) for task in model["tasks"]),
        ]
        for model in body["models"]
    ]  # fmt: skip
    kinds = ["number" if task["regression"] else f"{len(task['classes'])} classes" for task in body["tasks"]]
    about = Table(
        [("Task", False), ("of", False), ("Kind", False), ("Split by", False), ("Train", True), ("Valid", True), ("Test", True)],
        [
            [
                text(_short(task["task"])), Cell(task["of"]), Cell(kind),
                text(task["split"]), *(whole(task["proteins"][split]) for split in ("train", "valid", "test")),
            ]
            for task, kind in zip(body["tasks"], kinds, strict=True)
        ],
        "Proteins of each part.",
    )  # fmt: skip
    figures = [
        Figure(
            _by_layer(body["models"], place), clean(_short(name), 60), "Test score of each layer, by relative depth."
        )
        for place, name in enumerate(names)
    ]
    tables = [("Best layer of each task", Table(columns, rows)), ("Tasks", about)]
    return Section("representations", "What can be read off the layers", lead, figures, tables)


def _short(task: str) -> str:
    """A table's file name, a named task's name."""
    return task.rsplit("/", 1)[-1]


def _by_layer(models: Any, place: int) -> Markup:
    def paint(axes: Axes) -> None:
        for index, model in enumerate(models):
            layers = model["tasks"][place]["layers"]
            deepest = max(1, layers[-1]["layer"])
            depth, score = [row["layer"] / deepest for row in layers], [row["test"] for row in layers]
            axes.plot(depth, score, **stroke(index), marker="o", markersize=3, label=clean(model["model"], 32))
        axes.set_xlabel("layer / number of layers")
        axes.set_ylabel("score on test")
        axes.grid(axis="y")
        axes.legend(loc="lower right", handlelength=1.4)

    return draw(f"representations-{place}", "Score on test of each layer", paint, size=(330, 225))


def lines(scores: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and value of the figures, for a table in a terminal."""
    for row in scores.get("lm", {}).get("models", []):
        value = f"{number(row['loss'], 4)}, accuracy {number(row['accuracy'])}, F1 {number(row['f1'])}, MCC {number(row['mcc'])}"
        yield f"loss of {clean(row['model'], 40)}", value
    for model in scores.get("representations", {}).get("models", []):
        best = ", ".join(
            f"{clean(_short(t['task']), 24)} {number(t['score'])} (layer {t['layer']})" for t in model["tasks"]
        )
        yield f"representations of {clean(model['model'], 40)}", f"{number(model['score'])}: {best}"
