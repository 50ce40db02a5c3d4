"""Labels of whole proteins as the flat lists that counting takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from plmsae_cli.evaluation.concepts.counts import BatchLabels
from plmsae_cli.evaluation.concepts.vocabulary import Concept, Labels
from plmsae_cli.evaluation.proteins import groups
from plmsae_cli.plm.alphabet import AMINO_ACIDS
from plmsae_cli.store.permutation import counter_hash

ROTATION_SEED = 1
_TOGETHER = 65_536
"""Residues whose labels are counted at a time."""

Ints = npt.NDArray[np.int64]


class Labelled:
    """The concepts' ranges, by protein. P: proteins.

    Args:
        labels: ranges, whose `concepts` may be followed by the 20 amino acids (`amino_acids=True`).
        hashes_P: a hash of each protein, from which `rotated` takes its shift.
    """

    def __init__(self, labels: Labels, sequences: Sequence[str], hashes_P: npt.NDArray[np.uint64], amino_acids: bool):
        order = np.argsort(labels.protein_M, kind="stable")
        self.protein_M, self.concept_M = labels.protein_M[order], labels.concept_M[order]
        self.start_M, self.stop_M, self.instance_M = (
            labels.start_M[order],
            labels.stop_M[order],
            labels.instance_M[order],
        )
        self.sequences = sequences
        self.hashes_P = hashes_P
        self.amino_acids = amino_acids
        self.num_annotated = len(labels.concepts)
        self.instance_rank_C = instance_ranks(labels.concepts)

    def pairs(self, proteins: Sequence[int], rotated: bool) -> tuple[Ints, Ints, Ints]:
        """(residue in the batch, concept, instance) of every residue of every range, the proteins one after the other.

        `rotated` shifts all of a protein's labels along its chain, round the end, by a keyed hash: lengths, numbers and
        neighbourhoods stay, only their place is wrong.
        """
        found: list[tuple[Ints, Ints, Ints]] = []
        offset = 0
        for protein in proteins:
            length = len(self.sequences[protein])
            first, last = np.searchsorted(self.protein_M, [protein, protein + 1])
            sizes = self.stop_M[first:last] - self.start_M[first:last]
            within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            rows = np.repeat(self.start_M[first:last], sizes) + within
            if rotated and length > 1:
                shift = 1 + int(
                    counter_hash(ROTATION_SEED, self.hashes_P[protein : protein + 1])[0] % np.uint64(length - 1)
                )
                rows = (rows + shift) % length
            found.append(
                (
                    rows + offset,
                    np.repeat(self.concept_M[first:last], sizes),
                    np.repeat(self.instance_M[first:last], sizes),
                )
            )
            offset += length
        return tuple(np.concatenate(column) for column in zip(*found, strict=True))  # type: ignore[return-value]

    def batch(self, proteins: Sequence[int], device: torch.device | str, rotated: bool = False) -> BatchLabels:
        """The lists of a batch of whole proteins, on the device."""
        rows_E, concept_E, instance_E = self.pairs(proteins, rotated)
        total = self.num_annotated + (len(AMINO_ACIDS) if self.amino_acids else 0)
        rank_E = self.instance_rank_C[concept_E]
        chosen = rank_E >= 0
        names, local_S = np.unique(instance_E[chosen], return_inverse=True)
        order = np.argsort(local_S, kind="stable")
        concept_J = np.zeros(len(names), dtype=np.int64)
        concept_J[local_S] = rank_E[chosen]
        key_E = np.unique(rows_E * total + concept_E)  # overlapping ranges mark a residue once
        if self.amino_acids:
            letters = np.frombuffer("".join(self.sequences[p] for p in proteins).encode(), dtype=np.uint8)
            number = np.full(256, -1, dtype=np.int64)
            number[np.frombuffer(AMINO_ACIDS.encode(), dtype=np.uint8)] = np.arange(len(AMINO_ACIDS))
            known = np.flatnonzero(number[letters] >= 0)
            key_E = np.concatenate([key_E, known * total + self.num_annotated + number[letters[known]]])

        def move(values: Ints) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device)

        return BatchLabels(
            move(key_E // total),
            move(key_E % total),
            move(rows_E[chosen][order]),
            move(local_S[order]),
            move(concept_J),
        )


def instance_ranks(concepts: Sequence[Concept]) -> Ints:
    """For each concept its number among those with instance recall, -1 for the others."""
    by_instance = np.array([not concept.by_residue for concept in concepts], dtype=bool)
    return np.where(by_instance, np.cumsum(by_instance) - 1, -1).astype(np.int64)


def totals(labelled: Labelled, proteins: Sequence[int]) -> tuple[Ints, Ints]:
    """Residues and instances of each concept [C] in the proteins."""
    count = labelled.num_annotated + (len(AMINO_ACIDS) if labelled.amino_acids else 0)
    residues_C = np.zeros(count, dtype=np.int64)
    for places in groups([len(labelled.sequences[protein]) for protein in proteins], _TOGETHER):
        batch = labelled.batch([proteins[place] for place in places], "cpu")
        residues_C += np.bincount(batch.concept_E.numpy(), minlength=count)
    inside = np.isin(labelled.protein_M, np.asarray(proteins, dtype=np.int64))
    _, firsts = np.unique(labelled.instance_M[inside], return_index=True)
    return residues_C, np.bincount(labelled.concept_M[inside][firsts], minlength=count)
