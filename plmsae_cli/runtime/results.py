"""The headline figures of runs, for tables and sweeps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from plmsae_cli.runtime.metrics import metrics_line
from plmsae_cli.runtime.run_folder import read_json

_LONGEST_LINE = 1 << 16


def headline(run: Path) -> dict[str, float]:
    """The headline figures of an evaluated run, for tables of many runs; empty where there are none."""
    scores = read_json(run / "eval" / "metrics.json") or {}
    if "fidelity" not in scores:
        return {}
    fidelity = scores["fidelity"]
    found = {name: fidelity[name] for name in ("fvu", "cosine", "l0_mean", "dead_share")}
    if "loss" in fidelity:
        masked = fidelity["loss"]["masked"]
        found |= {name: masked[name] for name in ("recovered_zero", "recovered_mean") if name in masked}
    return found


def of_models(run: Path) -> dict[str, Any]:
    """What the axes about language models found, as in metrics.json; empty where they were not measured."""
    scores = read_json(run / "eval" / "metrics.json") or {}
    return {axis: scores[axis] for axis in ("lm", "representations") if axis in scores}


def last_metrics(run: Path) -> dict[str, Any] | None:
    """The last whole line of metrics.jsonl, which may be being written, or damaged since; None before the first."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_LINE))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    return next((line for text in reversed(lines) if (line := metrics_line(text)) is not None), None)


class Best(NamedTuple):
    """The trial of a sweep that is ahead."""

    hash: str
    values: Mapping[str, Any]
    metric: str
    value: float


def best_trial(run: Path) -> Best | None:
    """By the metric of a search, else by the FVU (of language models: the loss), the lowest; None where there is none yet.

    Figures are those of the evaluation, or where no trial is evaluated those of the last step of training.
    """
    sweep = read_json(run / "sweep.json") or {"trials": []}
    done = [row for row in sweep["trials"] if row["state"] == "done"]
    if (search := sweep.get("search")) is not None:
        sign = 1.0 if search["direction"] == "minimize" else -1.0
        found = [Best(r["hash"], r["values"], search["metric"], r["objective"]) for r in done]
        return min(found, key=lambda best: sign * best.value, default=None)
    found = [Best(r["hash"], r["values"], "fvu", r["metrics"]["fvu"]) for r in done if "fvu" in r["metrics"]]
    if not found:
        for row in done:
            last = last_metrics(run / "trials" / row["hash"]) or {}
            if metric := next((name for name in ("fvu", "loss") if last.get(name) is not None), None):
                found.append(Best(row["hash"], row["values"], metric, last[metric]))
    return min(found, key=lambda best: best.value, default=None)
