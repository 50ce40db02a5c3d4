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
SORTED = 8
"""How many times its bytes a list takes while it is sorted with as much that waits."""
_CANDIDATE = 20
"""Bytes of an entry in a file."""
_TALLY = 8 * (32 + 21 + 10 + 2)
"""Bytes of a latent's counts."""
_ALONG = 16
"""Bytes of an activation along a protein."""
_ACTIVE_IN_PROTEIN = 20
"""Residues of a protein with an example on which the latent is active, where nothing is known of it."""


def latent_entries(options: Features) -> int:
    """Entries of a latent's lists, when they are full."""
    return options.top + BANDS * options.random


def latents_a_pass(options: Features) -> int:
    """Latents, in whole groups, whose lists are filled in one reading of the rows."""
    group = latent_entries(options) * ENTRY * SORTED * options.latents_per_group
    return max(1, int(options.memory) // group) * options.latents_per_group


def estimate(options: Features, rows: int, num_latents: int, active: int, d: int) -> dict[str, Any]:
    """Readings of the rows, examples, bytes and memory, at most: lists of rare latents are not full.

    Args:
        active: latents active on a residue.
    """
    # An activation is in two lists at most: that of the strongest, and that of its band.
    lists = num_latents * latent_entries(options)
    candidates = min(2 * -(-rows // options.tasks) * active, lists) * options.tasks
    examples = min(2 * rows * active, lists)
    along = examples * _ACTIVE_IN_PROTEIN * _ALONG
    return {
        "rows": rows,
        "split": options.split,
        "latents": num_latents,
        "readings": 1 + -(-num_latents // latents_a_pass(options)),
        "examples": examples,
        "candidate_bytes": candidates * _CANDIDATE + num_latents * _TALLY * options.tasks,
        "list_bytes": examples * _CANDIDATE + num_latents * _TALLY,
        "activation_bytes": along + num_latents * SAMPLE * active * 8,
        "bytes": along // 2,
        "memory_bytes": int(options.memory) + num_latents * (_TALLY + 2 * 4 * d),
    }


def figures(scope: Scope, options: Features) -> dict[str, Any]:
    """The estimate for this experiment."""
    d, num_latents, active = scope.shape()
    return estimate(options, where(scope, options.split).rows, num_latents, active, d)
