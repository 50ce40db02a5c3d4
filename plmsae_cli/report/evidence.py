"""What the axes of evaluation found, for the page of a run: one section an axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from plmsae_cli.report.cells import ROWS, Cell, Figure, Section, Table, beyond, decimal, latent, text, whole
from plmsae_cli.report.interventions import contacts, steering, structure
from plmsae_cli.report.models import language_models, representations
from plmsae_cli.report.svg import SERIES, draw
from plmsae_cli.report.words import clean, count, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PATTERNS = ("dead", "point", "periodic", "short", "medium", "long", "whole")
CODES = {
    "sae": "dictionary",
    "residual": "residual dimensions",
    "pca": "principal components",
    "random_model": "random model",
    "shuffled": "rotated labels",
}


def sections(scores: Mapping[str, Any] | None) -> list[Section]:
    """The sections of metrics.json's axes beside fidelity, those that were measured."""
    makers = {
        "concepts": _concepts,
        "families": _families,
        "probes": _probes,
        "contacts": contacts,
        "structure": structure,
        "steering": steering,
        "lm": language_models,
        "representations": representations,
    }
    return [make(scores[axis]) for axis, make in makers.items() if scores is not None and axis in scores]


def _concepts(body: Mapping[str, Any]) -> Section:
    tally = body["proteins"]
    fate = "left out" if body["mode"] == "strict" else "kept"
    lead = (
        f"For each of {count(body['concepts'])} concepts that UniProt annotates, the latent that finds it best on one half of"
        f" {count(tally['used'])} proteins, scored on the other (halves by {body['split']}, mode {body['mode']})."
        f" {count(tally['in_training'])} proteins of the file were in training and {fate}."
    )
    codes = [(name, body["codes"][name]) for name in body["order"]]
    summary = Table(
        [("Code", False), ("Latents", True), ("Concepts, F1 > 0.5", True), ("Latents, F1 > 0.5", True), ("Mean best F1", True),
         ("95 %", False), ("AUROC", True), ("AUPRC", True)],
        [
            [
                Cell(CODES[name]), whole(row["latents"]), whole(row["concepts_above"]), whole(row["latents_above"]),
                decimal(row["mean_f1"]), Cell("[{:.3f}, {:.3f}]".format(*row["interval_mean_f1"])), decimal(row["mean_auroc"]),
                decimal(row["mean_auprc"]),
            ]
            for name, row in codes
        ],
        "The rows below the first learnt nothing of features: what they reach, any code reaches.",
    )  # fmt: skip
    best = sorted(body["best"], key=lambda row: -row["f1"])
    columns = [("Concept", False), ("Latent", True), ("Threshold", True), ("F1", True), ("95 %", False), ("Precision", True),
               ("Recall", True), ("by", False), ("AUROC", True), ("Best null", True), ("Positives", True)]  # fmt: skip
    rows = [
        [
            text(row["concept"]), latent(row["latent"]), decimal(row["threshold"], 2), decimal(row["f1"]),
            Cell("[{:.2f}, {:.2f}]".format(*row["interval_f1"]) if row["interval_f1"] else ""), decimal(row["precision"]),
            decimal(row["recall"]), Cell(row["recall_by"]), decimal(row["auroc"]),
            decimal(max(row["nulls"].values()) if row["nulls"] else None), whole(row["total"][1]),
        ]
        for row in best[:ROWS]
    ]  # fmt: skip
    figures = [
        Figure(
            _ranked({CODES[name]: row["f1"] for name, row in codes}),
            "Best F1 of every concept",
            "Each line is sorted by itself, from the concept that the code finds best. The gap between the dictionary and the"
            " others is what it adds.",
        )
    ]
    if body["curves"]:
        caption = "By residue, over all thresholds, for the latents of the best concepts (chosen on validation)."
        figures.append(Figure(_curves(body["curves"]), "Precision and recall", caption))
    above = sum(row["f1"] > 0.5 for row in body["amino_acids"])
    remark = f"Amino acids, which the model is given, are apart: {above} of 20 have a latent with F1 > 0.5.{beyond(len(best))}"
    tables = [("Against what learnt nothing", summary), ("Concepts", Table(columns, rows, remark))]
    return Section("concepts", "Concepts that latents find", lead, figures, tables)


def _families(body: Mapping[str, Any]) -> Section:
    tally = body["proteins"]
    lead = (
        f"The largest activation of a latent in a protein, against {count(body['classes'])} classes of"
        f" {count(tally['used'])} proteins ({body['split']}, mode {body['mode']}): on the half that scores,"
        f" {count(body['specific'])} latents mark a family with F1 above 0.7; with labels permuted"
        f" {count(body['specific_permuted'])} do."
    )
    if "found" in body:
        lead += (
            f" {count(body['found'])} classes are found with F1 above 0.5 by the latent that fits them best on train;"
            f" with labels permuted {count(body['found_permuted'])}."
        )
    histograms = {"dictionary": body["histogram"], "labels permuted": body["histogram_permuted"]}
    figures = [
        Figure(
            _histograms(histograms),
            "F1 of latents for their families",
            "Latents with a candidate class, on test. Where labels say nothing, all that is left is to mark every protein"
            " of a frequent class: its chance.",
        )
    ]
    patterns = Table(
        [("Pattern", False), ("Latents", True)], [[Cell(name), whole(body["patterns"][name])] for name in PATTERNS]
    )
    tables = [("Latents", _marks(body["best"], "The hundred latents that fit best on train."))]
    if "by_class" in body:
        remark = "Of each class the latent that fits it best on train. Chance: the F1 of marking every protein."
        tables.insert(0, ("Families", _marks(body["by_class"], remark)))
    return Section(
        "families", "Families that latents mark", lead, figures, [*tables, ("Activation patterns", patterns)]
    )


def _marks(found: Sequence[Mapping[str, Any]], remark: str) -> Table:
    columns = [("Family", False), ("Latent", True), ("F1", True), ("95 %", False), ("Chance", True), ("Precision", True),
               ("Recall", True), ("F1, train", True), ("Proteins", True), ("Pattern", False)]  # fmt: skip
    rows = [
        [
            text(row["family"]), latent(row["latent"]), decimal(row["f1"]), _ends(row.get("interval_f1")),
            decimal(row.get("chance")), decimal(row["precision"]), decimal(row["recall"]), decimal(row["f1_train"]),
            whole(row["proteins"]), Cell(row["pattern"]),
        ]
        for row in sorted(found, key=lambda row: -row["f1"])[:ROWS]
    ]  # fmt: skip
    return Table(columns, rows, remark + beyond(len(found)))


def _probes(body: Mapping[str, Any]) -> Section:
    tally = body["proteins"]
    lead = (
        f"Logistic regression on one latent (the best on train) and on all, trained on {count(tally['train'])} proteins"
        f" and scored on {count(tally['test'])} of other clusters. Mean AUROC:"
        f" {number(body['mean_auroc_single'])} with one latent,"
        f" {number(body['mean_auroc_all'])} with all, {_maybe(body.get('mean_auroc_raw'))} with the activations that they"
        " came from; on labels that say nothing"
        f" {_maybe(body.get('mean_auroc_single_null'))} and {_maybe(body.get('mean_auroc_all_null'))}."
    )
    columns = [("Target", False), ("of", False), ("Latent", True), ("AUROC, one", True), ("95 %", False), ("null", True),
               ("AUROC, all", True), ("95 %", False), ("null", True), ("AUROC, raw", True), ("95 %", False),
               ("AUPRC, all", True), ("Positives", True)]  # fmt: skip
    rows = [
        [
            text(row["target"]), Cell(row["of"]), latent(row["latent"]), decimal(row["auroc_single"]),
            _ends(row.get("interval_auroc_single")), decimal(row.get("auroc_single_null")), decimal(row["auroc_all"]),
            _ends(row.get("interval_auroc_all")), decimal(row.get("auroc_all_null")), decimal(row.get("auroc_raw")),
            _ends(row.get("interval_auroc_raw")), decimal(row["auprc_all"]), whole(row["positives_test"]),
        ]
        for row in body["targets"][:ROWS]
    ]  # fmt: skip
    remark = (
        "null: the same regressions on annotations rotated along each protein, and on proteins' labels dealt out anew."
        f" raw: the activations of a residue, or their mean over a protein.{beyond(len(body['targets']))}"
    )
    return Section("probes", "What can be read off the latents", lead, [], [("Targets", Table(columns, rows, remark))])


def _ends(interval: Sequence[float] | None) -> Cell:
    return Cell("[{:.2f}, {:.2f}]".format(*interval) if interval else "")


def _maybe(value: float | None) -> str:
    return "nothing" if value is None else number(value)


def _ranked(values: Mapping[str, Sequence[float]]) -> Markup:
    def paint(axes: Axes) -> None:
        for (name, each), colour in zip(values.items(), SERIES, strict=False):
            ordered = sorted(each, reverse=True)
            marker = "o" if len(ordered) < 30 else None
            axes.plot(range(1, len(ordered) + 1), ordered, color=colour, label=name, marker=marker, markersize=3)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("concepts, best first")
        axes.set_ylabel("F1 on test")
        axes.grid(axis="y")
        axes.legend(loc="upper right", handlelength=1.4)

    return draw(
        "concept-f1",
        "Best F1 of every concept, for the dictionary and what it is compared with",
        paint,
        size=(330, 225),
    )


def _curves(curves: Sequence[Mapping[str, Any]]) -> Markup:
    distinct = {tuple(curve["precision"]): curve for curve in reversed(curves)}  # `any` often equals its only label
    shown = list(reversed(distinct.values()))[: len(SERIES)]

    def paint(axes: Axes) -> None:
        for curve, colour in zip(shown, SERIES, strict=False):
            axes.plot(curve["recall"], curve["precision"], color=colour, label=clean(curve["concept"], 32))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("recall")
        axes.set_ylabel("precision")
        axes.grid()
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=1, handlelength=1.4)

    return draw("concept-curves", "Precision against recall of the best concepts", paint, size=(330, 280))


def _histograms(values: Mapping[str, Sequence[int]]) -> Markup:
    def paint(axes: Axes) -> None:
        for (name, each), colour in zip(values.items(), SERIES, strict=False):
            edges = [i / len(each) for i in range(len(each) + 1)]
            axes.stairs(each, edges, color=colour, label=name, linewidth=1.5)
        axes.set_xlim(0, 1)
        axes.set_xlabel("F1 on test")
        axes.set_ylabel("latents")
        axes.grid(axis="y")
        axes.legend(loc="upper right", handlelength=1.4)

    return draw("family-f1", "F1 of latents for families, and with labels permuted", paint)
