"""Proteins longer than the model reads: overlapping windows, each residue from the one where it is most central."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Piece(NamedTuple):
    """A stretch of a protein that is one document of a pack."""

    protein: int
    start: int
    """First residue that the model reads."""
    stop: int
    """One past the last."""
    first: int
    """First residue whose row is taken from this piece; start <= first < last <= stop."""
    last: int
    """One past the last such residue."""


def pieces(lengths: Sequence[int], window: int | None = None) -> list[Piece]:
    """The pieces of proteins of these lengths, in order; without `window` each is one piece.

    A protein of L > W residues has 1 + ceil((L - W) / H) windows of W, H = max(1, W // 2), begun at equal distances
    rounded down: floor(i (L - W) / (n - 1)). So neighbours overlap in at least half a window. A residue is taken from
    the window whose centre is nearest, between two equally near ones from the earlier.
    """
    found = []
    for protein, length in enumerate(lengths):
        if window is None or length <= window:
            found.append(Piece(protein, 0, length, 0, length))
            continue
        count = 1 - -(length - window) // max(1, window // 2)
        starts = [i * (length - window) // (count - 1) for i in range(count)]
        # Residue r is no farther from the centre of the window at s than from that at s' > s while 2 r <= s + s' + W - 1.
        edges = [0, *((a + b + window - 1) // 2 + 1 for a, b in pairwise(starts)), length]
        found += [
            Piece(protein, start, start + window, first, last)
            for start, (first, last) in zip(starts, pairwise(edges), strict=True)
        ]
    return found
