"""The page of a sweep: its trials in a table that sorts, and the frontier of FVU against L0."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from plmsae_cli.config.errors import UserError
from plmsae_cli.report import plots
from plmsae_cli.report.cells import HEADLINES, Cell, known
from plmsae_cli.report.frontier import frontier
from plmsae_cli.report.page import write_page
from plmsae_cli.report.parallel import parallel
from plmsae_cli.report.provenance import layer, model, provenance
from plmsae_cli.report.reading import Run, read_run
from plmsae_cli.report.words import clean, clean_block, number
from plmsae_cli.runtime.run_folder import read_json

_HASH = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Row(NamedTuple):
    """One trial."""

    link: str | None
    name: str
    cells: list[Cell]
    state: str
    best: bool


def build_sweep_report(run: Path) -> Path:
    """Write `<run>/report/index.html` from `<run>/sweep.json`, and return its path.

    Raises:
        UserError: the folder is no sweep, or a file in it is damaged.
    """
    record, sweep = read_run(run), read_json(run / "sweep.json")
    if sweep is None:
        raise UserError(f"{run} is not a sweep: it has no sweep.json", "ask for the report of a single run")
    trials: list[dict[str, Any]] = sweep["trials"]
    keys = list(sweep["grid"])
    scored = [trial for trial in trials if _point(trial) is not None]
    points = [point for trial in scored if (point := _point(trial)) is not None]
    on_front = frontier(points)
    best = [scored[index] for index in on_front]
    return write_page(
        run,
        "sweep.html",
        script="sort.js",
        name=clean(record.name, 64),
        subtitle=_subtitle(record, len(trials)),
        verdict=_verdict(trials, scored, len(on_front)),
        plot=plots.pareto(_groups(scored, keys), [points[i] for i in on_front]) if scored else None,
        lines=_parallel(scored, keys, set(on_front)),
        search=_search(sweep),
        keys=[(clean(short, 40), clean(key, 80)) for short, key in _short(keys).items()],
        metrics=[*(name for name, _ in HEADLINES.values()), *(["objective"] if "search" in sweep else [])],
        rows=[_row(run, trial, keys, any(trial is each for each in best), "search" in sweep) for trial in trials],
        provenance=provenance(record),
        yaml=clean_block(record.yaml),
    )


def _point(trial: dict[str, Any]) -> tuple[float, float] | None:
    metrics = trial.get("metrics") or {}
    active, fvu = metrics.get("l0_mean"), metrics.get("fvu")
    if active is None or fvu is None or not (math.isfinite(active) and math.isfinite(fvu)):
        return None
    return float(active), float(fvu)


def _short(keys: list[str]) -> dict[str, str]:
    """Last part of each dotted field where that is unambiguous, else the whole -> the field."""
    last = [key.rpartition(".")[2] for key in keys]
    return {(name if last.count(name) == 1 else key): key for name, key in zip(last, keys, strict=True)}


def _groups(trials: list[dict[str, Any]], keys: list[str]) -> dict[str, list[tuple[float, float, str]]]:
    """Points by the first varying field other than k (at most five values), labelled by the others."""
    num_values = {key: len({_shown(trial["values"].get(key)) for trial in trials}) for key in keys}
    varying = [key for key in keys if num_values[key] > 1]
    names = {key: short for short, key in _short(keys).items()}
    # What each trial has a value of its own of, such as a drawn rate, groups nothing.
    candidates = [
        key for key in varying if not key.endswith(".k") and num_values[key] <= 5 and num_values[key] < len(trials)
    ]
    # A single field that varies is told by its labels alone.
    colour = candidates[0] if candidates and len(varying) > 1 else None
    labelled = [key for key in varying if key != colour]
    groups: dict[str, list[tuple[float, float, str]]] = {}
    for trial in trials:
        name = f"{names[colour]} {_shown(trial['values'].get(colour))}" if colour is not None else ""
        text = ", ".join(f"{names[key]} {_shown(trial['values'].get(key))}" for key in labelled)
        point = _point(trial)
        assert point is not None
        groups.setdefault(name, []).append((*point, text))
    return groups


def _shown(value: Any) -> str:
    return clean(value if isinstance(value, str) else json.dumps(value), 40)


def _parallel(scored: list[dict[str, Any]], keys: list[str], front: set[int]) -> Markup | None:
    """The scored trials across the fields that vary, L0 and FVU; None where one axis tells all, or no trial varies."""
    short = {key: name for name, key in _short(keys).items()}
    columns = {short[key]: [trial["values"].get(key) for trial in scored] for key in keys}
    columns = {name: values for name, values in columns.items() if len({_shown(value) for value in values}) > 1}
    if len(columns) < 2:
        return None
    for metric in ("l0_mean", "fvu"):
        columns[HEADLINES[metric][0]] = [trial["metrics"][metric] for trial in scored]
    return parallel(columns, front)


def _search(sweep: dict[str, Any]) -> str:
    """What the trials were chosen for, and the best one."""
    search = sweep.get("search")
    if search is None:
        return ""
    found = [trial for trial in sweep["trials"] if trial.get("objective") is not None]
    text = f"Optuna chose the trials to {search['direction']} {search['metric']}"
    if not found:
        return clean(f"{text}.", 200)
    pick = min if search["direction"] == "minimize" else max
    best = pick(found, key=lambda trial: float(trial["objective"]))
    return clean(f"{text}; the best is {best['hash']}, {number(best['objective'])}.", 200)


def _row(run: Path, trial: dict[str, Any], keys: list[str], best: bool, searched: bool) -> Row:
    name = str(trial["hash"])
    # The hash comes from a file and goes into an address: only a plain name may lead anywhere.
    page = run / "trials" / name / "report" / "index.html"
    link = f"../trials/{name}/report/index.html" if _HASH.fullmatch(name) and page.is_file() else None
    cells = []
    for key in keys:
        value = trial["values"].get(key)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        cells.append(Cell(_shown(value), repr(value) if numeric else ""))
    metrics = trial.get("metrics") or {}
    cells += [known(metrics.get(key), show) for key, (_, show) in HEADLINES.items()]
    if searched:
        cells.append(known(trial.get("objective"), number))
    return Row(link, clean(name, 20), cells, clean(trial.get("state", ""), 20), best)


def _subtitle(run: Run, num_trials: int) -> str:
    where = layer(run)
    parts = ["sweep", model(run), None if where is None else f"layer {where}", f"{num_trials} trials"]
    return " · ".join(clean(part, 80) for part in parts if part)


def _verdict(trials: list[dict[str, Any]], scored: list[dict[str, Any]], num_front: int) -> str:
    states = [str(trial.get("state", "")) for trial in trials]
    text = f"{states.count('done')} of {len(trials)} trials are done"
    for state in ("pruned", "failed"):
        if count := states.count(state):
            text += f", {count} {state}"
    if not scored:
        return text + "; none has been scored yet."
    lowest = min(scored, key=lambda trial: float(trial["metrics"]["fvu"]))["metrics"]
    return (
        f"{text}; {num_front} lie on the frontier, where less unexplained variance costs more active"
        f" latents. The lowest FVU is {number(lowest['fvu'])}, with {number(lowest['l0_mean'])} active"
        " latents a residue."
    )
