"""InterPLM's collection of maximal examples on the codes of `features.py`.

Its PerProteinActivationTracker gets the codes of the first 960 latents as the dense matrices it takes, made before the clock
starts, a protein's rows of 160 latents at a time as its loop does. Its time is linear in the latents, and is multiplied to all
of them. It keeps for each latent 20 proteins by their strongest residue, and no position; those of both sides are compared.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

from plmsae_cli.evaluation.features.job import LISTS
from plmsae_cli.evaluation.features.reading import Active, Side
from plmsae_cli.evaluation.features.select import Selection

LATENTS, CHUNK, TOP = 960, 160, 20


def _tracker(path: Path, num_latents: int) -> Any:
    """The module imports loaders of its package, and packages that collecting does not use."""
    for name in ("sae.dictionary", "utils", "sae.inference", "data_processing.embedding_loader"):
        sys.modules[f"interplm.{name}"] = MagicMock()
    for name in ("pandas", "tqdm"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = MagicMock()
    sys.path.insert(0, str(path))
    module: Any = importlib.import_module("interplm.analysis.per_protein_tracking")
    return module.PerProteinActivationTracker(num_latents, n_top=TOP)


def collect(
    path: Path, side: Side, batches: Callable[[], Iterator[Active]], selection: Selection
) -> tuple[float, float]:
    """Seconds of their tracker on all latents, and the share of its latents whose strongest proteins are ours."""
    total = selection.last - selection.first
    tracker = _tracker(path, total)
    ends = zip(side.offset_P.tolist(), side.length_P.tolist(), strict=True)
    places = {protein: list(range(offset, offset + length)) for protein, (offset, length) in enumerate(ends)}
    spent = 0.0
    for first in range(0, LATENTS, CHUNK):
        dense = torch.zeros(side.rows, CHUNK)
        for batch in batches():
            mine = ((batch.latent_P >= first) & (batch.latent_P < first + CHUNK)).nonzero().squeeze(1)
            dense[batch.start + batch.which_P[mine], batch.latent_P[mine] - first] = batch.act_P[mine]
        latents = list(range(first, first + CHUNK))
        for protein, rows in places.items():
            begun = time.process_time()
            tracker.update(dense[rows].cpu().numpy(), protein, latents)
            spent += time.process_time() - begun
    entries = selection.lists.entries().cpu()
    top_C = entries.list_C % LISTS == 0
    strongest: list[set[int]] = [set() for _ in range(total)]
    for latent, owner in zip((entries.list_C[top_C] // LISTS).tolist(), entries.owner_C[top_C].tolist(), strict=True):
        strongest[latent].add(owner)
    same = sum({owner for _, owner in heap} == strongest[n] for n, heap in enumerate(tracker.max_heap[:LATENTS]))
    return spent * total / LATENTS, same / LATENTS
