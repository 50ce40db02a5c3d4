"""The headline figures of runs, for tables and sweeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LONGEST_LINE = 1 << 16


def headline(run: Path) -> dict[str, float]:
    """The headline figures of an evaluated run, for tables of many runs; empty where there are none."""
    path = run / "eval" / "metrics.json"
    if not path.exists():
        return {}
    scores = json.loads(path.read_text())
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
    path = run / "eval" / "metrics.json"
    scores = json.loads(path.read_text()) if path.exists() else {}
    return {axis: scores[axis] for axis in ("lm", "representations") if axis in scores}


def last_metrics(run: Path) -> dict[str, Any] | None:
    """The last whole line of metrics.jsonl, which may be being written; None before the first."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LONGEST_LINE))
        lines = file.read().split(b"\n")[:-1]
    last: dict[str, Any] | None = json.loads(lines[-1]) if lines else None
    return last
