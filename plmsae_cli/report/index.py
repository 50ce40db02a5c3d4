"""One page of all runs under a folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from plmsae_cli.config.errors import UserError
from plmsae_cli.report.cells import HEADLINES, Cell, known
from plmsae_cli.report.page import render
from plmsae_cli.report.provenance import layer, model
from plmsae_cli.report.reading import Run, read_run
from plmsae_cli.report.table import perplexity
from plmsae_cli.report.words import clean, count, number, seconds
from plmsae_cli.runtime.run_folder import read_json
from plmsae_cli.store.fs import Store


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
        subtitle="1 run" if len(runs) == 1 else f"{len(runs)} runs",
        verdict=f"{told}." if runs else "No runs yet.",
        columns=[("run", False), ("model", False), ("layer", True), ("dictionary", False), ("latents", True), ("k", True),
                 *((name, True) for name, _ in HEADLINES.values()), ("perplexity", True), ("time", True), ("updated", True)],
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
    spent = sum((status.get("stage_seconds") or {}).values())
    cells = [
        *_what(run),
        *(known(found.figures.get(name), show) for name, (_, show) in HEADLINES.items()),
        known(None if run is None else perplexity(run), number),
        known(spent or None, seconds),
        known(status.get("updated"), lambda at: time.strftime("%Y-%m-%d %H:%M", time.localtime(at))),
    ]
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
        known(width, count),
        Cell("–") if k is None or run.architecture is None else Cell(clean(k, 10), clean(k, 10)),
    ]
