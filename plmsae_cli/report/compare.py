"""Runs side by side, from what training and evaluation left: tables for the terminal, a CSV, a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.tree import plain
from plmsae_cli.report.cells import Cell, Table
from plmsae_cli.report.cells import Figure as Picture
from plmsae_cli.report.differences import Difference, differences
from plmsae_cli.report.page import write_page
from plmsae_cli.report.reading import Run, read_run
from plmsae_cli.report.table import perplexity
from plmsae_cli.report.versus import CURVES, By, curves, levels, trained
from plmsae_cli.report.words import clean, count, number, percent, seconds
from plmsae_cli.store.fs import Store


class Figure(NamedTuple):
    """One row: where it stands in metrics.json, and how it is shown."""

    axis: str
    name: str
    path: tuple[str, ...]
    show: Callable[[Any], str]


_TRAINED = [
    Figure("training", "tokens", ("training", "tokens"), count),
    Figure("training", "time", ("training", "seconds"), seconds),
    Figure("training", "residues/s, median", ("training", "tokens_per_second"), count),
    Figure("training", "loss, last twentieth", ("training", "loss"), number),
    Figure("training", "FVU, last twentieth", ("training", "fvu"), number),
    Figure("training", "perplexity, last validation", ("training", "perplexity"), number),
]
_MASKED = ("fidelity", "loss", "masked")
_SAE = ("concepts", "codes", "sae")


def _contact_figures() -> list[Figure]:
    found = []
    for method in ("jacobian", "head"):
        for cut in ("L", "L/2", "L/5"):
            where = ("contacts", "methods", method, cut)
            found.append(Figure("contacts", f"P@{cut}, {method}", (*where, "sae"), number))
        found.append(
            Figure("contacts", f"recovered at L, {method}", ("contacts", "methods", method, "L", "recovered"), percent)
        )
    return found


def _structure_figures() -> list[Figure]:
    found = []
    for mode in ("isolated", "in_place", "propagated"):
        for name, key in (("RMSD, Å", "rmsd"), ("TM", "tm")):
            where = ("structure", "dictionary", mode, key)
            found.append(Figure("structure", f"{name}, {mode}", where, number))
    return found


FIGURES = [
    *_TRAINED,
    Figure("dictionary", "architecture", ("architecture",), str),
    Figure("dictionary", "layer", ("layer",), str),
    Figure("dictionary", "latents", ("num_latents",), count),
    Figure("dictionary", "k", ("k",), str),
    Figure("fidelity", "FVU", ("fidelity", "fvu"), number),
    Figure("fidelity", "cosine", ("fidelity", "cosine"), number),
    Figure("fidelity", "L0", ("fidelity", "l0_mean"), number),
    Figure("fidelity", "dead latents", ("fidelity", "dead_share"), percent),
    Figure("fidelity", "loss recovered, zero ablation", (*_MASKED, "recovered_zero"), percent),
    Figure("fidelity", "loss recovered, mean ablation", (*_MASKED, "recovered_mean"), percent),
    Figure("concepts", "concepts scored", ("concepts", "concepts"), count),
    Figure("concepts", "concepts with F1 > 0.5", (*_SAE, "concepts_above"), count),
    Figure("concepts", "latents with F1 > 0.5", (*_SAE, "latents_above"), count),
    Figure("concepts", "mean best F1", (*_SAE, "mean_f1"), number),
    Figure("families", "family-specific latents", ("families", "specific"), count),
    Figure("families", "the same, labels permuted", ("families", "specific_permuted"), count),
    Figure("families", "classes found", ("families", "found"), count),
    Figure("families", "classes found, labels permuted", ("families", "found_permuted"), count),
    Figure("probes", "AUROC, best single latent", ("probes", "mean_auroc_single"), number),
    Figure("probes", "AUROC, all latents", ("probes", "mean_auroc_all"), number),
    Figure("probes", "AUROC, activations", ("probes", "mean_auroc_raw"), number),
    *_contact_figures(),
    *_structure_figures(),
    Figure("steering", "effects found, latents", ("steering", "found"), count),
    Figure("steering", "effects tested", ("steering", "tests"), count),
    Figure("steering", "effects found, random latents", ("steering", "found_null"), count),
    Figure("steering", "mean KL, latents", ("steering", "kl"), number),
    Figure("steering", "mean KL, random directions", ("steering", "kl_direction"), number),
]


class Comparison(NamedTuple):
    """What was compared, and where it was written."""

    columns: list[str]
    rows: list[list[Any]]
    differences: list[Difference]
    levels: dict[By, dict[str, tuple[list[float], list[list[float | None]]]]]
    """`tokens` or `seconds` -> field of metrics.jsonl -> stops, and a row a stop with a value a run."""
    csv: Path
    page: Path


class Side(NamedTuple):
    """One run."""

    name: str
    yaml: str
    """What was given on the command line."""
    run: Path


def _rows(runs: Sequence[Run]) -> list[list[Any]]:
    """Axis, name and each run's value of the figures that any of them has; None where one has not."""
    bodies = [_body(run) for run in runs]
    rows = [[figure.axis, figure.name, *(_at(body, figure.path) for body in bodies)] for figure in FIGURES]
    return [row for row in rows if any(value is not None for value in row[2:])]


def want_evaluations(sides: Sequence[Side]) -> None:
    """Raises UserError where an SAE was not evaluated, with the command that does it."""
    for side in sides:
        if not (side.run / "eval" / "metrics.json").is_file():
            raise UserError(
                f"{side.run} was not evaluated: it has no eval/metrics.json",
                f"plmsae eval {side.yaml} (or `plmsae run {side.yaml}`, where it is not trained yet)",
            )


def _body(run: Run) -> dict[str, Any]:
    """What the evaluation says, and what training does under `training`."""
    lines = trained(run)
    training: dict[str, Any] = {}
    if lines:
        last = lines[-max(1, len(lines) // 20) :]
        training = {"tokens": lines[-1]["tokens"], "seconds": lines[-1]["seconds"]}
        for key in ("loss", "fvu"):
            values = [line[key] for line in last if line.get(key) is not None]
            training |= {key: sum(values) / len(values)} if values else {}
        speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
        training |= {"tokens_per_second": median(speeds)} if speeds else {}
    training["perplexity"] = perplexity(run)
    return {**(run.scores or {}), "training": training}


def names(sides: Sequence[Side]) -> list[str]:
    """Names of runs; with their folder where two are called the same."""
    called = [side.name for side in sides]
    return [side.name if called.count(side.name) == 1 else str(side.run) for side in sides]


def _at(body: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = body
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def shown(rows: Sequence[Sequence[Any]]) -> list[list[str]]:
    """The rows as text, blank where there is nothing."""
    show = {(figure.axis, figure.name): figure.show for figure in FIGURES}
    return [
        [axis, name, *("" if v is None else show[axis, name](v) for v in values)] for axis, name, *values in rows
    ]  # fmt: skip


def write_comparison(folder: Path, sides: Sequence[Side]) -> Comparison:
    """Write `compare.csv` (numbers in full) and `report/index.html` into a folder.

    Raises:
        UserError: a run is given twice, or a folder is no run.
    """
    folders = [side.run for side in sides]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise UserError(f"{twice} is given twice", "name each run once")
    runs = {name: read_run(side.run) for name, side in zip(names(sides), sides, strict=True)}
    columns, rows = ["axis", "figure", *runs], _rows([*runs.values()])
    changed = differences([run.config for run in runs.values()])
    lines = {name: trained(run) for name, run in runs.items()}
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([columns, *rows])
    path = folder / "compare.csv"
    Store().write(str(path), [out.getvalue().encode()])
    cells = [
        [
            Cell(clean(text, 80), repr(float(raw)) if isinstance(raw, int | float) else "")
            for text, raw in zip(line, row, strict=True)
        ]
        for line, row in zip(shown(rows), rows, strict=True)
    ]
    heads = [(clean(column, 80), place > 1) for place, column in enumerate(columns)]
    bys: tuple[tuple[By, str], ...] = (("tokens", "tokens"), ("seconds", "time"))
    pictures = [
        Picture(svg, f"{CURVES[key]}, by {word}")
        for key in CURVES
        for by, word in bys
        if (svg := curves(lines, key, by)) is not None
    ]
    page = write_page(
        folder, "compare.html", script="sort.js", name="Comparison", subtitle=f"{len(sides)} runs",
        verdict="What each run was asked, how it learnt and what came out, side by side; blank where there is nothing. Figures"
        " of an evaluation compare only where the proteins and settings of the axis are the same.",
        demo=any(run.demo for run in runs.values()), table=Table(heads, cells), figures_=pictures,
        science=_changes([*runs], changed, True), cosmetic=_changes([*runs], changed, False),
    )  # fmt: skip
    at = {by: {key: levels(lines, key, by) for key in CURVES} for by, _ in bys}
    return Comparison(columns, rows, changed, at, path, page)


def _changes(names: Sequence[str], changed: Sequence[Difference], science: bool) -> Table | None:
    rows = [
        [Cell(clean(each.field, 80)), *(Cell(clean(plain(value), 80)) for value in each.values)]
        for each in changed
        if each.science == science
    ]
    return Table([("field", False), *((clean(name, 80), False) for name in names)], rows) if rows else None
