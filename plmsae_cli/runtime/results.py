"""The headline figures of runs, for tables and sweeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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
