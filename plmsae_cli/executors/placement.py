"""Which SAEs of one stream train together: groups of near-equal cost that fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What one SAE asks of a device."""

    cost: float
    """Relative work: parameters x tokens."""
    held: int
    """Bytes that stay: weights, gradients, optimiser state."""
    passing: int
    """Bytes of a step, free again when the next SAE takes its turn."""


def memory(loads: Sequence[Load]) -> int:
    """Bytes of a group on one device."""
    return sum(load.held for load in loads) + max(load.passing for load in loads)


def place(loads: Sequence[Load], num_groups: int, capacity: int) -> list[list[int]]:
    """Indices of the loads in at most `num_groups` groups, or in as many as must be for each to fit into `capacity` bytes.

    The dearest first, each into the cheapest group that has room (Graham 1969, SIAM J. Appl. Math. 17:416: where memory
    does not bind, the dearest group costs at most 4/3 - 1/(3 num_groups) of the least possible). A load larger than
    `capacity` gets a group of its own.
    """
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    for index in sorted(range(len(loads)), key=lambda i: -loads[i].cost):
        with_room = [g for g in groups if not g or memory([*(loads[i] for i in g), loads[index]]) <= capacity]
        if not with_room:
            groups.append([])
            with_room = groups[-1:]
        min(with_room, key=lambda g: sum(loads[i].cost for i in g)).append(index)
    return [sorted(g) for g in groups if g]


def allot(streams: Sequence[Sequence[Load]], num_places: int) -> list[int]:
    """Groups of each stream: one, and while places are left one more for the stream whose groups are dearest."""
    counts = [1] * len(streams)
    while sum(counts) < num_places:
        open_ = [i for i, loads in enumerate(streams) if counts[i] < len(loads)]
        if not open_:
            break
        counts[max(open_, key=lambda i: sum(load.cost for load in streams[i]) / counts[i])] += 1
    return counts
