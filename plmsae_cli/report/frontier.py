"""The trials that no other trial beats on both counts."""

from __future__ import annotations

from collections.abc import Sequence


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto frontier of (cost, cost), by increasing first cost.

    A point is on it if no other is at most equal in both and smaller in one; of equal points, the first.
    """
    best: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i], i)):
        if not best or points[index][1] < points[best[-1]][1]:
            best.append(index)
    return best
