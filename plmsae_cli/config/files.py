"""Which files are experiments."""

from __future__ import annotations

from pathlib import Path


def is_experiment(name: str | Path) -> bool:
    """By its name, in either case: some systems write `.YAML`."""
    return str(name).lower().endswith((".yaml", ".yml"))
