"""What all steps of the axis share: the options, the dictionary's shape, the side that is read, and where files lie.

The steps: `select` (a piece of the rows: candidates of every list, tallies), `merge` (a share of the latents: the lists),
`gather` (a piece again: activations around the chosen residues), `write` (a share of the latents: what pages read),
`finish`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from plmsae_cli.config.features import Features
from plmsae_cli.evaluation.features import layout
from plmsae_cli.evaluation.features.planning import SORTED, latents_a_pass
from plmsae_cli.evaluation.features.reading import Reader, Side
from plmsae_cli.evaluation.features.source import where
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.runtime.device import pick_device
from plmsae_cli.runtime.saved import SavedSAE, load_sae_with_facts
from plmsae_cli.runtime.task import Context, Task
from plmsae_cli.store.fs import join
from plmsae_cli.store.tensorfile import TensorFile

AXIS = "features"
CLUSTERS = "clusters.parquet"
LISTS = 1 + len(layout.BANDS)
"""Of a latent: the strongest, then random ones of each band."""
_SLICE = 1 << 16


@dataclass(eq=False)
class Job:
    """One task's view of the axis."""

    task: Task
    scope: Scope
    options: Features
    context: Context

    @cached_property
    def device(self) -> torch.device:
        return pick_device()

    @cached_property
    def saved(self) -> SavedSAE:
        return load_sae_with_facts(self.scope.folder, self.scope.store)

    @property
    def num_latents(self) -> int:
        return self.saved.model.num_latents

    @cached_property
    def side(self) -> Side:
        return Side(self.scope.store, where(self.scope, self.options.split))

    @cached_property
    def reader(self) -> Reader:
        return Reader(self.saved.model, self.side, self.device, self.context.check_stop)

    @property
    def per_group(self) -> int:
        return self.options.latents_per_group

    @property
    def groups(self) -> int:
        return -(-self.num_latents // self.per_group)

    def latents_of(self, first_group: int, last_group: int) -> tuple[int, int]:
        """Latents of groups [first_group, last_group)."""
        return first_group * self.per_group, min(self.num_latents, last_group * self.per_group)

    def widths(self) -> torch.Tensor:
        """Entries of each list of a latent [L], on the device."""
        return torch.tensor([self.options.top] + [self.options.random] * len(layout.BANDS), device=self.device)

    def passes(self) -> list[tuple[int, int]]:
        """Groups whose lists are filled in one reading of the rows: all, where memory suffices."""
        fits = latents_a_pass(self.options) // self.per_group
        return [(first, min(self.groups, first + fits)) for first in range(0, self.groups, fits)]

    def buffered(self, entry: int) -> int:
        """Entries of so many bytes that may wait in memory, to be sorted then."""
        return max(1, int(self.options.memory) // (entry * SORTED))

    def path(self, *names: str) -> str:
        return self.scope.path(AXIS, *names)

    def shown_proteins(self, merged: list[str]) -> npt.NDArray[np.int64]:
        """The proteins that have an example, ascending."""
        shown_P = np.zeros(len(self.side.length_P), dtype=bool)
        for path in merged:
            file = TensorFile(self.scope.store, path)
            rows = file.shape("row")[0]
            for start in range(0, rows, _SLICE):
                shown_P[self.side.protein_of(file.read("row", start, min(rows, start + _SLICE)).numpy())] = True
        return np.flatnonzero(shown_P)

    @property
    def has_concepts(self) -> bool:
        """Whether concepts are measured, and to be counted here."""
        return self.scope.options.concepts is not None and self.options.concepts > 0

    def clusters(self) -> npt.NDArray[np.int64] | None:
        """The cluster of each protein, where lists hold one of each."""
        if self.options.one_per != "cluster":
            return None
        found: npt.NDArray[np.int64] = self.scope.read_table(AXIS, CLUSTERS)["cluster"].to_numpy()
        return found

    @property
    def late(self) -> str:
        """What the steps behind the second pass depend on besides, as their names have it."""
        return str(self.task.args["step"]).split("-")[1]

    def files(self, step: str, folder: str) -> list[str]:
        """Paths of what the pieces of a step left in a folder, in their order."""
        of = self.task.args["of"]
        names = self.scope.files_of(self.task, [f"{step}-{index}of{of}" for index in range(of)])
        return [join(self.scope.folder, name) for name in names if f"/{folder}/" in name]
