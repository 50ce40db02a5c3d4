"""The scoring task: the frozen pairs on the test proteins, protein by protein.

Letters: P test proteins of the piece, C concepts, U distinct latents among the chosen ones, B bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plmsae_cli.evaluation.concepts.counts import BatchLabels, levels
from plmsae_cli.evaluation.concepts.labelling import instance_ranks
from plmsae_cli.evaluation.concepts.prepared import AXIS, Prepared
from plmsae_cli.evaluation.concepts.scores import BINS, bins
from plmsae_cli.evaluation.concepts.sources import Source, read
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.evaluation.proteins import piece
from plmsae_cli.evaluation.rows import group_residues
from plmsae_cli.runtime.task import Context
from plmsae_cli.sae.interface import Latents
from plmsae_cli.store.fs import FileRecord
from plmsae_cli.store.tensorfile import TensorFile, write_tensors


class PairScores:
    """Counts of the frozen pair of each concept.

    `table_P4C` has for each protein the residues hit, fired on, found (instances hit, or residues) and to be found;
    `positive_CB` and `negative_CB` histograms of activation / maximum on and off the concept.
    """

    def __init__(self, latent_C: Tensor, threshold_C: Tensor, maximum_N: Tensor, rank_C: Tensor, proteins: int) -> None:
        device = maximum_N.device
        self.latent_U, place_C = torch.unique(latent_C.to(device), return_inverse=True)
        self.place_C = place_C
        self.least_C = threshold_C.to(device) + 1
        """Level from which the pair counts as firing."""
        self.maximum_N = maximum_N
        self.maximum_U = maximum_N[self.latent_U]
        self.slot_N = torch.full((len(maximum_N),), len(self.latent_U), dtype=torch.int64, device=device)
        self.slot_N[self.latent_U] = torch.arange(len(self.latent_U), device=device)
        self.rank_C = rank_C.to(device)
        self.by_instance_I = (self.rank_C >= 0).nonzero(as_tuple=True)[0]
        count = len(latent_C)
        self.table_P4C = torch.zeros(proteins, 4, count, dtype=torch.int32, device=device)  # the largest thing held
        self.positive_CB = torch.zeros(count, BINS, dtype=torch.int64, device=device)
        self.all_UB = torch.zeros(len(self.latent_U), BINS, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, latents: Latents, labels: BatchLabels, protein_R: Tensor) -> None:
        """Count a batch of whole proteins; `protein_R` is the place of each residue's protein in the table."""
        rows, width = len(protein_R), len(self.latent_U)
        slot_RK = self.slot_N[latents.indices_BK]
        level_RU = torch.zeros(rows, width + 1, dtype=torch.int64, device=protein_R.device)
        level_RU.scatter_reduce_(1, slot_RK, levels(latents, self.maximum_N), "amax")
        acts_RU = torch.zeros(rows, width + 1, device=protein_R.device)
        acts_RU.scatter_reduce_(1, slot_RK, latents.acts_BK, "amax")
        level_RU, bin_RU = level_RU[:, :-1], bins(acts_RU[:, :-1], self.maximum_U)

        fires_RC = level_RU[:, self.place_C] >= self.least_C
        self.table_P4C[:, 1].index_add_(0, protein_R, fires_RC.int())
        hit_E = fires_RC[labels.row_E, labels.concept_E].int()
        owner_E = protein_R[labels.row_E]
        by_residue_E = (self.rank_C[labels.concept_E] < 0).int()
        for column, value_E in ((0, hit_E), (2, hit_E * by_residue_E), (3, by_residue_E)):
            self._count(column, owner_E, labels.concept_E, value_E)
        self._instances(fires_RC, labels, protein_R)

        place_RU = torch.arange(width, device=bin_RU.device) * BINS + bin_RU
        self.all_UB.view(-1).index_add_(0, place_RU.flatten(), torch.ones_like(place_RU.flatten()))
        at_E = labels.concept_E * BINS + bin_RU[labels.row_E, self.place_C[labels.concept_E]]
        self.positive_CB.view(-1).index_add_(0, at_E, torch.ones_like(at_E))

    def _instances(self, fires_RC: Tensor, labels: BatchLabels, protein_R: Tensor) -> None:
        if not len(labels.concept_J):
            return
        concept_J = self.by_instance_I[labels.concept_J]
        found_J = torch.zeros_like(concept_J, dtype=torch.int32)
        fires_S = fires_RC[labels.row_S, concept_J[labels.instance_S]].int()
        found_J.scatter_reduce_(0, labels.instance_S, fires_S, "amax")
        owner_J = torch.zeros_like(concept_J).scatter_(0, labels.instance_S, protein_R[labels.row_S])
        self._count(2, owner_J, concept_J, found_J)
        self._count(3, owner_J, concept_J, torch.ones_like(found_J))

    def _count(self, column: int, protein: Tensor, concept: Tensor, value: Tensor) -> None:
        key = (protein * 4 + column) * len(self.place_C) + concept
        self.table_P4C.view(-1).index_add_(0, key, value)

    @property
    def negative_CB(self) -> Tensor:
        return self.all_UB[self.place_C] - self.positive_CB


def score(
    scope: Scope, prepared: Prepared, sources: list[Source], index: int, of: int, context: Context
) -> list[FileRecord]:
    """Score the frozen pairs on piece `index` of the test proteins; `place` has their places among all of these."""
    test = prepared.half(1)
    lengths = [len(prepared.labelled.sequences[p]) for p in test]
    device = sources[0].rows.device
    mine = [place for group in piece(lengths, group_residues(device), index, of) for place in group]
    number = {place: n for n, place in enumerate(mine)}
    rank_C = torch.from_numpy(instance_ranks(prepared.concepts))
    paired: dict[str, PairScores] = {}
    for source in sources:
        choice = TensorFile(scope.store, scope.path(AXIS, f"choice-{source.name}.safetensors"))
        paired[source.name] = PairScores(
            choice.read("latent"), choice.read("threshold"), source.code.maximum_N, rank_C, len(mine)
        )
    check_stop, progress = context.check_stop, context.progress
    for places, source, latents, labels in read(prepared.labelled, sources, test, index, of, check_stop, progress):
        length_G = torch.tensor([lengths[place] for place in places])
        protein_R = torch.tensor([number[place] for place in places]).repeat_interleave(length_G).to(device)
        paired[source.name].add(latents, labels, protein_R)
    return [
        write_tensors(
            scope.store,
            scope.path(AXIS, "scores", f"{name}-{index}of{of}.safetensors"),
            {
                "place": torch.tensor(mine, dtype=torch.int64),
                "table": pair.table_P4C.cpu(),
                "positive": pair.positive_CB.cpu(),
                "negative": pair.negative_CB.cpu().contiguous(),
            },
        )
        for name, pair in paired.items()
    ]
