"""What the axis would read, write and hold, before anything exists."""

from __future__ import annotations

from typing import Any

from plmsae_cli.config.features import Features
from plmsae_cli.evaluation.features.source import where
from plmsae_cli.evaluation.frame import Scope

BANDS = 4
_CANDIDATE = 20
"""Bytes of a list's entry in the file of a piece."""
_LATENT = 8 * 65 + 60 * 4
"""Bytes of a latent's counts, and of its row in latents.parquet."""
_SAMPLED = 32


def figures(scope: Scope, options: Features) -> dict[str, Any]:
    """Rows, examples at most, bytes of intermediate files and of the result at most, and how often rows are read."""
    rows = where(scope, options.split).rows
    train = scope.experiment.train
    assert train is not None
    found: dict[str, Any] = {"rows": rows, "split": options.split, "tasks": options.tasks}
    return found
