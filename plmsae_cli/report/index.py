"""One page of all runs under a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from plmsae_cli.config.errors import UserError
from plmsae_cli.report.cells import Cell
from plmsae_cli.report.page import render
from plmsae_cli.report.provenance import layer, model
from plmsae_cli.report.reading import Run, read_run
from plmsae_cli.report.words import clean, count, number, percent, seconds
from plmsae_cli.runtime.run_folder import read_json
from plmsae_cli.store.fs import Store

FIGURES: dict[str, Callable[[float], str]] = {
    "fvu": number,
    "l0_mean": number,
    "dead_share": percent,
    "recovered_zero": percent,
}
_NAMES = {"fvu": "FVU", "l0_mean": "L0", "dead_share": "dead", "recovered_zero": "loss recovered"}


class Entry(NamedTuple):
    """One run: where its own page is (from the index), and its cells."""

    link: str | None
    name: str
    cells: list[Cell]
    state: str


class Found(NamedTuple):
    """A run, as the caller knows its state and headline figures."""

    folder: Path
    name: str
    state: str
    figures: dict[str, float]


def write_index(root: Path, runs: Sequence[Found]) -> Path:
    """Write `<root>/index.html`, and return its path. A run whose files cannot be read is listed by its state alone."""
    entries = [_entry(root, run) for run in sorted(runs, key=lambda run: run.name)]
    states = [run.state for run in runs]
    told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    html = render(
        "index.html",
        script="sort.js",
        name=clean(root.resolve().name or str(root), 64),
        subtitle=f"{len(runs)} runs",
        verdict=f"{told}." if runs else "No runs yet.",
        columns=[("run", False), ("model", False), ("layer", True), ("dictionary", False), ("latents", True), ("k", True),
                 *((name, True) for name in _NAMES.values()), ("perplexity", True), ("time", True), ("updated", True)],
        rows=entries,
    )  # fmt: skip
    path = root / "index.html"
    Store().write(str(path), [html])
    return path


def _entry(root: Path, found: Found) -> Entry:
    page = found.folder / "report" / "index.html"
    link = quote(page.relative_to(root).as_posix()) if page.is_file() else None
    status: dict[str, Any] = {}
    run: Run | None = None
    try:
        status = read_json(found.folder / "status.json") or {}
        run = read_run(found.folder)
    except UserError:
        pass
    cells = [*_what(run), *(_figure(found.figures, name) for name in FIGURES), _perplexity(run)]
    spent = sum((status.get("stage_seconds") or {}).values())
    cells.append(Cell(seconds(spent), repr(float(spent))) if spent else Cell("–"))
    updated = status.get("updated")
    cells.append(
        Cell("–") if updated is None else Cell(time.strftime("%Y-%m-%d %H:%M", time.localtime(updated)), repr(updated))
    )
    return Entry(link, clean(found.name, 80), cells, clean(found.state, 20))


def _what(run: Run | None) -> list[Cell]:
    if run is None:
        return [Cell("–")] * 5
    k = (run.scores or run.dictionary.get("config") or {}).get("k") or run.asked("train", "sae", "k")
    place, width = layer(run), run.num_latents
    return [
        Cell(clean(model(run) or "–", 40)),
        Cell("–") if place is None else Cell(clean(place, 10), clean(place, 10)),
        Cell(clean(run.architecture or "–", 30)),
        Cell("–") if width is None else Cell(count(width), str(width)),
        Cell("–") if k is None or run.architecture is None else Cell(clean(k, 10), clean(k, 10)),
    ]


def _figure(figures: dict[str, float], name: str) -> Cell:
    value = figures.get(name)
    return Cell("–") if value is None else Cell(FIGURES[name](value), repr(float(value)))


def _perplexity(run: Run | None) -> Cell:
    scores = list(run.valid[-1]["valid"].values()) if run is not None and run.valid else []
    if not scores:
        return Cell("–")
    value = sum(float(each["perplexity"]) for each in scores) / len(scores)
    return Cell(number(value), repr(value))
