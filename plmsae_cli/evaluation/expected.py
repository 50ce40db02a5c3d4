"""What is known of an axis's proteins and of its memory before anything is made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from plmsae_cli.evaluation.annotations.entries import Entry

LOOKED = 1_000_000
"""Residues of an annotated file that are read to tell how long its proteins are: such files are slow to read."""
PROGRAM = 500 << 20
"""Bytes of a process that holds nothing of an axis: Python, torch, what allocators keep."""


@dataclass(frozen=True)
class Sample:
    """Proteins and residues of a sample, at most."""

    proteins: int
    residues: int
    annotated: bool
    """Whether anything is known of residues."""


def expected_sample(entries: Iterable[Entry], residues: int, max_length: int) -> Sample:
    """What `residues` of these proteins will be, the lengths of those that are not looked at being those of the others."""
    proteins = seen = 0
    annotated = False
    for entry in entries:
        if not 0 < len(entry.sequence) <= max_length:
            continue
        proteins += 1
        seen += len(entry.sequence)
        annotated = annotated or bool(entry.features)
        if seen >= residues or (annotated and seen >= LOOKED):
            break
    else:
        return Sample(proteins, seen, annotated)
    wanted = max(residues, seen)
    return Sample(math.ceil(proteins * wanted / seen), wanted, annotated)
