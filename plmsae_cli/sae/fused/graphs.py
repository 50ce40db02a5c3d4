"""Launched kernels, replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Graphs:
    """Runs parts of a step, each a function of a number of places for dead latents alone.

    The first run of a part with a number launches its kernels, which compiles them and lets libraries choose; the second
    captures them, and from then on the graph is replayed. A part must not call a collective: a communicator cannot be
    closed while a graph holds its calls.
    """

    def __init__(self) -> None:
        self.graphs: dict[tuple[str, int], torch.cuda.CUDAGraph | None] = {}
        self._pool: Any = None

    def __call__(self, name: str, places: int, part: Callable[[int], None]) -> None:
        """`name` tells the parts apart."""
        key = (name, places)
        if key not in self.graphs:
            # The number of dead grows in steps: graphs of smaller numbers give their memory back.
            self.graphs = {old: graph for old, graph in self.graphs.items() if old[1] == 0 or old[1] >= places}
            self.graphs[key] = None
            part(places)
            return
        graph = self.graphs[key]
        if graph is None:
            graph = self.graphs[key] = torch.cuda.CUDAGraph()
            # Other threads (the loader, NCCL) go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                part(places)
            self._pool = self._pool or graph.pool()
        graph.replay()


def launched(name: str, places: int, part: Callable[[int], None]) -> None:
    """What stands in for `Graphs` where there are none."""
    part(places)
