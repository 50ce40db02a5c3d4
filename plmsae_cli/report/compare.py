"""SAEs side by side, from what their evaluations left: a table for the terminal, a CSV, a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plmsae_cli.config.errors import UserError
from plmsae_cli.report.cells import Cell, Table
from plmsae_cli.report.page import write_page
from plmsae_cli.report.reading import read_json
from plmsae_cli.report.words import clean, count, number, percent
from plmsae_cli.store.fs import Store


class Figure(NamedTuple):
    """One row: where it stands in metrics.json, and how it is shown."""

    axis: str
    name: str
    path: tuple[str, ...]
    show: Callable[[Any], str]


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


FIGURES = [
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
    Figure("probes", "AUROC, best single latent", ("probes", "mean_auroc_single"), number),
    Figure("probes", "AUROC, all latents", ("probes", "mean_auroc_all"), number),
    *_contact_figures(),
    Figure("steering", "effects found, latents", ("steering", "found"), count),
    Figure("steering", "effects tested", ("steering", "tests"), count),
    Figure("steering", "effects found, random latents", ("steering", "found_null"), count),
    Figure("steering", "mean KL, latents", ("steering", "kl"), number),
    Figure("steering", "mean KL, random directions", ("steering", "kl_direction"), number),
]


class Side(NamedTuple):
    """One SAE."""

    name: str
    yaml: str
    """What was given on the command line."""
    run: Path


def compare(sides: Sequence[Side]) -> tuple[list[str], list[list[Any]]]:
    """Columns (axis, figure, then each SAE's name), and a row a figure that any of them has; None where one has not.

    Raises:
        UserError: an SAE was not evaluated, or is given twice.
    """
    runs = [side.run for side in sides]
    if twice := next((run for run in runs if runs.count(run) > 1), None):
        raise UserError(f"{twice} is given twice: these experiments share one run", "name each once")
    metrics = []
    for side in sides:
        body = read_json(side.run / "eval" / "metrics.json")
        if body is None:
            raise UserError(
                f"{side.run} was not evaluated: it has no eval/metrics.json",
                f"plmsae eval {side.yaml} (or `plmsae run {side.yaml}`, where it is not trained yet)",
            )
        metrics.append(body)
    rows = []
    for figure in FIGURES:
        values = [_at(body, figure.path) for body in metrics]
        if any(value is not None for value in values):
            rows.append([figure.axis, figure.name, *values])
    return ["axis", "figure", *names(sides)], rows


def names(sides: Sequence[Side]) -> list[str]:
    """Names of runs; with their folder where two are called the same."""
    plain = [side.name for side in sides]
    return [side.name if plain.count(side.name) == 1 else str(side.run) for side in sides]


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


def write_comparison(
    folder: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]], demo: bool
) -> tuple[Path, Path]:
    """Write `compare.csv` (numbers in full) and `report/index.html` into a folder, and return their paths."""
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
    listed = len(columns) - 2
    page = write_page(
        folder, "compare.html", script="sort.js", name="Comparison", subtitle=f"{listed} sparse autoencoders",
        verdict="The figures of each evaluation, side by side; blank where an axis was not measured. Figures compare only where"
        " the proteins and settings of the axis are the same.",
        demo=demo, table=Table(heads, cells),
    )  # fmt: skip
    return path, page
