"""The one pass: how often each latent, above each threshold, fires on each concept and hits its instances.

Letters: R residues of a batch, N latents, K active latents of a residue, C concepts, T thresholds, E pairs (residue, concept),
J instances of a batch, S pairs (residue, instance). Everything kept is an integer, so counts merge by addition and do not
depend on how proteins were split into batches, tasks or machines.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from plmsae_cli.sae.interface import Latents

THRESHOLDS = (0.0, 0.15, 0.5, 0.6, 0.8)
"""Shares of a latent's maximum above which (strictly) it counts as firing."""
CELLS = 1 << 25
"""Elements of the largest intermediate tensor."""
DENSE_SHARE = 8
"""From one active latent in so many on, a matrix product over all latents is quicker than a list of the active ones."""


@dataclass(frozen=True)
class BatchLabels:
    """What is annotated in a batch of whole proteins, on its device."""

    row_E: Tensor
    """Residue of each distinct pair (residue, concept), int64."""
    concept_E: Tensor
    row_S: Tensor
    """Residue of each pair (residue, instance), ordered by instance; instances of kinds with instance recall only."""
    instance_S: Tensor
    concept_J: Tensor
    """Concept of each instance, counted among those with instance recall."""


def levels(latents: Latents, maximum_N: Tensor) -> Tensor:
    """How many of the thresholds each activation exceeds, int64 [R, K]; 0 is inactive.

    An activation is above threshold t if it is strictly greater than t times the latent's maximum; one above the maximum is
    above all. A latent whose maximum is 0 (it never fired when maxima were taken) is above all wherever it fires.
    """
    maximum_RK = maximum_N[latents.indices_BK]
    level_RK = (latents.acts_BK > THRESHOLDS[0] * maximum_RK).to(torch.int8)
    for threshold in THRESHOLDS[1:]:
        level_RK += latents.acts_BK > threshold * maximum_RK
    return level_RK.long()


class Counts:
    """Counts of latents [first, first + N) of a code; `add` a batch at a time, read `at_least` at the end.

    Memory: 8 T N (C + C_i + 1) bytes, C_i the concepts with instance recall.
    """

    def __init__(
        self, num_latents: int, num_concepts: int, num_instance: int, device: torch.device | str, first: int = 0
    ):
        self.num_latents = num_latents
        self.first = first
        self.hits_CNT = torch.zeros(num_concepts, num_latents, len(THRESHOLDS), dtype=torch.int64, device=device)
        self.instances_CNT = torch.zeros(num_instance, num_latents, len(THRESHOLDS), dtype=torch.int64, device=device)
        self.fired_NT = torch.zeros(num_latents, len(THRESHOLDS), dtype=torch.int64, device=device)
        self._reached = False

    @staticmethod
    def bytes(num_latents: int, num_concepts: int, num_instance: int) -> int:
        """Bytes that the counts of one half occupy."""
        return 8 * len(THRESHOLDS) * num_latents * (num_concepts + num_instance + 1)

    @torch.no_grad()
    def add(self, latents: Latents, maximum_N: Tensor, labels: BatchLabels) -> None:
        """Count a batch; `maximum_N` is of the whole code."""
        assert not self._reached, "counts were already read"
        level_RK = levels(latents, maximum_N)
        index_RK = latents.indices_BK - self.first
        if self.first or self.num_latents < len(maximum_N):
            inside_RK = (index_RK >= 0) & (index_RK < self.num_latents)
            level_RK = torch.where(inside_RK, level_RK, 0)
            index_RK = torch.where(inside_RK, index_RK, 0)
        if level_RK.shape[1] * DENSE_SHARE >= self.num_latents:
            self._add_dense(level_RK, index_RK, labels)
        else:
            self._add_sparse(level_RK, index_RK, labels)

    def _add_sparse(self, level_RK: Tensor, index_RK: Tensor, labels: BatchLabels) -> None:
        # The exact level of each active pair is counted; sums from above make thresholds of them in `at_least`.
        place_RK = index_RK * len(THRESHOLDS) + (level_RK - 1).clamp_(min=0)
        one_RK = (level_RK > 0).long()
        self.fired_NT.view(-1).index_add_(0, place_RK.flatten(), one_RK.flatten())
        cells, step = self.num_latents * len(THRESHOLDS), max(1, CELLS // max(1, level_RK.shape[1]))
        for rows_E, concept_E in zip(torch.split(labels.row_E, step), torch.split(labels.concept_E, step), strict=True):
            key_EK = concept_E[:, None] * cells + place_RK[rows_E]
            self.hits_CNT.view(-1).index_add_(0, key_EK.flatten(), one_RK[rows_E].flatten())
        self._add_instances(labels, level_RK, index_RK)

    def _add_dense(self, level_RK: Tensor, index_RK: Tensor, labels: BatchLabels) -> None:
        rows, concepts = level_RK.shape[0], self.hits_CNT.shape[0]
        level_RN = torch.zeros(rows, self.num_latents, dtype=torch.int64, device=level_RK.device)
        level_RN.scatter_reduce_(1, index_RK, level_RK, "amax")
        y_RC = torch.zeros(rows, concepts, device=level_RK.device)
        y_RC.view(-1).index_fill_(0, labels.row_E * concepts + labels.concept_E, 1.0)
        assert rows < 1 << 24, "float32 counts no further"
        for t in range(len(THRESHOLDS)):
            exact_RN = (level_RN == t + 1).float()
            self.hits_CNT[:, :, t] += (y_RC.T @ exact_RN).long()
            self.fired_NT[:, t] += exact_RN.sum(0).long()
        every_RN = torch.arange(self.num_latents, device=level_RK.device).expand(rows, -1)
        self._add_instances(labels, level_RN, every_RN)

    def _add_instances(self, labels: BatchLabels, level_RK: Tensor, index_RK: Tensor) -> None:
        """The largest level of each latent within each instance, counted by the instance's concept."""
        count = len(labels.concept_J)
        if count == 0:
            return
        cells = self.num_latents * len(THRESHOLDS)
        flat = self.instances_CNT.view(-1)
        step = max(1, CELLS // self.num_latents)
        edges = torch.searchsorted(
            labels.instance_S, torch.arange(0, count + step, step, device=labels.instance_S.device)
        )
        bounds = edges.tolist()  # once a batch
        for part, (begin, end) in enumerate(pairwise(bounds)):
            concept_J = labels.concept_J[part * step : (part + 1) * step]
            best_JN = torch.zeros(len(concept_J) * self.num_latents, dtype=torch.int32, device=level_RK.device)
            rows_S, local_S = labels.row_S[begin:end], labels.instance_S[begin:end] - part * step
            width = max(1, CELLS // max(1, level_RK.shape[1]))
            level_int_RK = level_RK.int()
            for some_S, owner_S in zip(torch.split(rows_S, width), torch.split(local_S, width), strict=True):
                key_SK = owner_S[:, None] * self.num_latents + index_RK[some_S]
                best_JN.scatter_reduce_(0, key_SK.flatten(), level_int_RK[some_S].flatten(), "amax")
            self._count_best(best_JN.view(len(concept_J), -1), concept_J, cells, flat)

    def _count_best(self, best_JN: Tensor, concept_J: Tensor, cells: int, flat: Tensor) -> None:
        if best_JN.device.type == "cpu":  # few pairs fire, and a CPU finds them without waiting for anything
            instance_P, latent_P = best_JN.nonzero(as_tuple=True)
            key_P = concept_J[instance_P] * cells + latent_P * len(THRESHOLDS) + best_JN[instance_P, latent_P] - 1
            flat.index_add_(0, key_P, torch.ones_like(key_P))
            return
        for t in range(len(THRESHOLDS)):
            self.instances_CNT[:, :, t].index_add_(0, concept_J, (best_JN == t + 1).long())

    def at_least(self) -> Counts:
        """The counts themselves, from now on of activations above each threshold rather than between two."""
        if not self._reached:
            for counts in (self.hits_CNT, self.instances_CNT, self.fired_NT):
                for t in reversed(range(len(THRESHOLDS) - 1)):
                    counts[..., t] += counts[..., t + 1]
            self._reached = True
        return self
