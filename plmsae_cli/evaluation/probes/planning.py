"""What the axis will hold, before anything exists."""

from __future__ import annotations

from plmsae_cli.evaluation.expected import PROGRAM, Sample

WIDEST, FULL = 4096, 0.125
"""Latents at most, and the share of them active, for which all of them are turned to principal axes: a matrix without zeros."""
CELLS = 1 << 22
"""Elements of the largest intermediate tensor of an interval."""
BOOTSTRAPS = 1000
"""Draws of test proteins for an interval."""
TEST_SHARE = 0.2
_DRAWS = 64
"""Bytes for each of `CELLS`."""
_FACTORS = 40
"""Bytes of an element of a matrix whose principal axes are found."""


def needed(sample: Sample, labels: bool, dimensions: int, num_latents: int, active: int) -> int:
    """Bytes held for the kind of rows that needs more: residues where they are annotated, proteins where they have labels.

    Of a protein as many latents are reckoned with as its residues would have if each drew its own; they share more.
    """
    share = min(1.0, active / num_latents)
    entries = round(sample.residues * num_latents * share)
    of_residues = held(sample.residues, entries, dimensions, num_latents) if sample.annotated else 0
    fires = 1 - (1 - share) ** (sample.residues / max(1, sample.proteins))
    entries = round(sample.proteins * num_latents * fires)
    of_proteins = held(sample.proteins, entries, dimensions, num_latents) if labels else 0
    return max(of_residues, of_proteins)


def turned(rows: int, entries: int, num_latents: int) -> bool:
    """Whether a matrix with so many entries is kept with its zeros."""
    return num_latents <= WIDEST and entries >= FULL * rows * num_latents


def held(rows: int, entries: int, dimensions: int, num_latents: int) -> int:
    """Bytes that a process holds at most, the language model aside, which reads and fits rows of one kind.

    An active latent is row, column and value, 24 bytes: twice while it is read and cut in two, and once more, as row and value
    by column, for fits. Activations are float64, and float32 besides while they are read.

    Args:
        entries: active latents of all rows.
    """
    raw = rows * dimensions * 8
    draws = _DRAWS * min(CELLS, round(BOOTSTRAPS * TEST_SHARE * rows))
    axes = _FACTORS * dimensions**2
    reading = raw + max(rows * dimensions * 4 + axes, 48 * entries)
    if turned(rows, entries, num_latents):
        fitting = raw + 24 * entries + rows * num_latents * 8 + max(_FACTORS * num_latents**2, draws)
    else:
        fitting = raw + max(56 * entries, 40 * entries + draws)
    return max(reading, fitting) + 100 * rows + PROGRAM
