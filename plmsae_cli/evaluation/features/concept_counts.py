"""Each latent's best concepts, counted at 100 thresholds on the test proteins of the axis `concepts`.

Letters: J pairs (latent, concept), L levels (0 silent to 100), R residues of a batch, K active latents of a residue, E pairs
(residue, concept), S pairs (residue, instance).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from plmsae_cli.evaluation.concepts.counts import BatchLabels
from plmsae_cli.evaluation.concepts.labelling import instance_ranks
from plmsae_cli.evaluation.concepts.prepared import AXIS as CONCEPTS
from plmsae_cli.evaluation.concepts.prepared import Prepared, load
from plmsae_cli.evaluation.concepts.sources import SAE, Source, read
from plmsae_cli.evaluation.features import layout
from plmsae_cli.evaluation.features.job import Job
from plmsae_cli.evaluation.frame import write_table
from plmsae_cli.evaluation.rows import Rows
from plmsae_cli.sae.interface import Latents
from plmsae_cli.store.fs import FileRecord
from plmsae_cli.store.tensorfile import TensorFile, write_tensors

THRESHOLDS = tuple(j / layout.LEVELS for j in range(layout.LEVELS))
_TEST = 1


def listed(job: Job) -> Any:
    """The rows of the axis's latent_concepts.parquet that are counted, by latent and rank."""
    table = job.scope.read_table(CONCEPTS, "latent_concepts.parquet")
    rank = table["rank"].to_numpy()
    kept = table.filter(rank <= job.options.concepts)
    return kept.sort_by([("latent", "ascending"), ("rank", "ascending")])


def fine_levels(acts: Tensor, maximum: Tensor) -> Tensor:
    """How many of the 100 thresholds j / 100 of its maximum each activation exceeds, int64, of any shape.

    Strictly, and in the arithmetic of the axis `concepts` (`counts.levels`), so that both agree at the thresholds they share.
    """
    thresholds_T = torch.tensor(THRESHOLDS, device=acts.device)
    guess = (acts / maximum * layout.LEVELS).clamp(0, layout.LEVELS).nan_to_num(0).long()
    base = (guess - 1).clamp(0, layout.LEVELS - 3)
    level = base.clone()
    for step in range(3):
        level += acts > thresholds_T[base + step] * maximum
    return torch.where(acts > 0, level, 0)


class PairCounts:
    """`inside_JL`: residues of the concept by level of the latent; `found_JL`: its instances by their highest level, for
    kinds with instance recall; `fired_NL`: all residues on which a latent is active by level. Level 0 is left empty."""

    def __init__(self, latent_J: Tensor, concept_J: Tensor, maximum_N: Tensor, prepared: Prepared) -> None:
        device = maximum_N.device
        self.num_latents, self.maximum_N = len(maximum_N), maximum_N
        key_J = concept_J * self.num_latents + latent_J
        self.key_J, order_J = key_J.sort()
        self.order_J = order_J
        rank_C = torch.from_numpy(instance_ranks(prepared.concepts))
        self.by_instance_I = (rank_C >= 0).nonzero().squeeze(1).to(device)
        shape = (len(key_J), layout.LEVELS + 1)
        self.inside_JL, self.found_JL = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
        self.fired_NL = torch.zeros(self.num_latents, shape[1], dtype=torch.int64, device=device)

    def _pair(self, concept: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """The number of each pair that is counted, and which are."""
        key = concept * self.num_latents + latent
        place = torch.searchsorted(self.key_J, key).clamp(max=len(self.key_J) - 1)
        return self.order_J[place], self.key_J[place] == key

    @torch.no_grad()
    def add(self, latents: Latents, labels: BatchLabels) -> None:
        """A batch of whole proteins."""
        level_RK = fine_levels(latents.acts_BK, self.maximum_N[latents.indices_BK])
        fires_RK = level_RK > 0
        self._count(self.fired_NL, latents.indices_BK[fires_RK], level_RK[fires_RK])
        if not len(self.key_J):
            return
        index_EK, level_EK = latents.indices_BK[labels.row_E], level_RK[labels.row_E]
        pair_EK, known_EK = self._pair(labels.concept_E[:, None], index_EK)
        known_EK &= level_EK > 0
        self._count(self.inside_JL, pair_EK[known_EK], level_EK[known_EK])
        if not len(labels.row_S):
            return
        concept_S = self.by_instance_I[labels.concept_J[labels.instance_S]]
        index_SK, level_SK = latents.indices_BK[labels.row_S], level_RK[labels.row_S]
        pair_SK, known_SK = self._pair(concept_S[:, None], index_SK)
        known_SK &= level_SK > 0
        instance_SK = labels.instance_S[:, None].expand_as(pair_SK)
        key_X = instance_SK[known_SK] * len(self.key_J) + pair_SK[known_SK]
        hit_U, place_X = torch.unique(key_X, return_inverse=True)
        highest_U = torch.zeros_like(hit_U).scatter_reduce_(0, place_X, level_SK[known_SK], "amax")
        self._count(self.found_JL, hit_U % len(self.key_J), highest_U)

    @staticmethod
    def _count(table: Tensor, row: Tensor, level: Tensor) -> None:
        table.view(-1).index_add_(0, row * table.shape[1] + level, torch.ones_like(level))


def pairs(job: Job, prepared: Prepared) -> tuple[Tensor, Tensor]:
    """Latent and number of the concept of every listed row [J]."""
    table = listed(job)
    number = {concept.name: place for place, concept in enumerate(prepared.concepts)}
    concepts = [number[name] for name in table["concept"].to_pylist()]
    return torch.from_numpy(table["latent"].to_numpy().astype(np.int64)), torch.tensor(concepts, dtype=torch.int64)


def count(job: Job, index: int, of: int) -> list[FileRecord]:
    """Piece `index` of the test proteins."""
    prepared = load(job.scope)
    rows = Rows(job.scope, job.options.batch_tokens, job.context.check_stop)
    model = job.saved.model.to(rows.device)
    latent_J, concept_J = (column.to(rows.device) for column in pairs(job, prepared))
    counts = PairCounts(latent_J, concept_J, model.maximum_N, prepared)
    mine = prepared.half(_TEST)
    source = Source(SAE, model, rows)
    check_stop, progress = job.context.check_stop, job.context.progress
    for _, _, latents, labels in read(prepared.labelled, [source], mine, index, of, check_stop, progress):
        counts.add(latents, labels)
    tensors = {"inside": counts.inside_JL, "found": counts.found_JL, "fired": counts.fired_NL[latent_J]}
    tensors = {name: table.int().cpu() for name, table in tensors.items()}
    return [write_tensors(job.scope.store, job.path("counts", f"{index}of{of}.safetensors"), tensors)]


def concepts_table(job: Job, counted: list[str]) -> FileRecord:
    """concepts.parquet, from all pieces."""
    prepared = load(job.scope)
    files = [TensorFile(job.scope.store, path) for path in counted]
    inside_JL, found_JL, fired_JL = (
        sum((file.read(name).long() for file in files), start=torch.zeros((), dtype=torch.int64)).numpy()
        for name in ("inside", "found", "fired")
    )
    table = listed(job)
    _, concept_J = pairs(job, prepared)
    kinds = [prepared.concepts[c] for c in concept_J.tolist()]
    by_residue_J = np.array([kind.by_residue for kind in kinds], dtype=bool)
    outside_JL = fired_JL - inside_JL
    found_JL = np.where(by_residue_J[:, None], inside_JL, found_JL)
    place_J = concept_J.numpy()
    positive_J = prepared.positive_CH[place_J, _TEST]
    residues = prepared.facts["residues"]["test"]
    inside_JL[:, 0] = positive_J - inside_JL.sum(1)
    outside_JL[:, 0] = residues - positive_J - outside_JL.sum(1)
    found_JL[:, 0] += prepared.total_CH[place_J, _TEST] - found_JL.sum(1)
    columns = {
        "latent": table["latent"].to_numpy().astype(np.int32),
        "rank": table["rank"].to_numpy().astype(np.int8),
        "concept": table["concept"],
        "kind": table["kind"],
        "by_residue": by_residue_J,
        "threshold": table["threshold"].to_numpy().astype(np.float32),
        **{
            name: _lists(values)
            for name, values in (("inside", inside_JL), ("outside", outside_JL), ("found", found_JL))
        },
    }
    return write_table(job.scope.store, job.path(layout.CONCEPTS), pa.table(columns, schema=layout.CONCEPTS_SCHEMA))


def _lists(values_JL: Any) -> pa.Array:
    ends = np.arange(0, values_JL.size + 1, values_JL.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.ascontiguousarray(values_JL).ravel().astype(np.int32)))


def facts(job: Job) -> dict[str, Any]:
    """For index.json."""
    found = job.scope.read_json(CONCEPTS, "prepared.json")
    return {
        "thresholds": list(THRESHOLDS),
        "proteins": found["proteins"]["test"],
        "residues": found["residues"]["test"],
        "by": found["split"],
    }
