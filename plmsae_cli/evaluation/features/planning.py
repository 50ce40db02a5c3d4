"""What the axis would read, write and hold, before anything exists."""

from __future__ import annotations

from typing import Any

from plmsae_cli.config.features import Features
from plmsae_cli.evaluation.features.source import where
from plmsae_cli.evaluation.frame import Scope

BANDS = 4
SAMPLE = 32
"""Random firings of a latent that tell what fires with it."""
ENTRY = 24
"""Bytes of an entry of a list: list and key, row, owner."""
SORTED = 5
"""How many times its bytes a list takes while it is sorted."""
_CANDIDATE = 20
"""Bytes of an entry in a file."""
_TALLY = 8 * (32 + 21 + 10 + 2)
"""Bytes of a latent's counts."""
_ALONG = 16 * 20 + 24
"""Bytes that an example takes behind the second pass, its latent active on 20 residues of the protein."""


def latent_entries(options: Features) -> int:
    """Entries of a latent's lists, when they are full."""
    return options.top + BANDS * options.random


def latents_a_pass(options: Features) -> int:
    """Latents, in whole groups, whose lists are filled in one reading of the rows."""
    group = latent_entries(options) * ENTRY * SORTED * options.latents_per_group
    return max(1, int(options.memory) // group) * options.latents_per_group


def figures(scope: Scope, options: Features) -> dict[str, Any]:
    """Rows, latents, files and bytes, at most: lists of rare latents are not full."""
    rows = where(scope, options.split).rows
    train = scope.experiment.train
    assert train is not None
    assert train.sae is not None
    d = scope.manifest["d"] if scope.manifest else scope.lineage.d
    num_latents = train.sae.width(d)
    # An activation is an entry of two lists at most, and pieces may be shorter than lists are.
    active = getattr(train.sae, "k", None) or 64
    firings = rows * active // options.tasks
    candidates = min(2 * firings, num_latents * latent_entries(options)) * options.tasks
    chosen = min(2 * rows * active, num_latents * latent_entries(options))
    lists = num_latents * (latent_entries(options) * _CANDIDATE + _TALLY)
    return {
        "rows": rows,
        "split": options.split,
        "latents": num_latents,
        "tasks": 4 * options.tasks + 2,
        "readings": 1 + -(-num_latents // latents_a_pass(options)),
        "examples": chosen,
        "bytes_temporary": candidates * _CANDIDATE + num_latents * _TALLY * options.tasks + lists + chosen * _ALONG
        + num_latents * SAMPLE * active * 8,
        "bytes": chosen * _ALONG // 3,
        "memory": int(options.memory) + num_latents * (_TALLY + 4 * d * 2),
    }  # fmt: skip
