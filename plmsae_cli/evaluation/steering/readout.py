"""What steering does to the predictions at masked residues of many proteins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plmsae_cli.evaluation.steering.edits import VARIANTS, Mode, Steer, edit
from plmsae_cli.plm.alphabet import AMINO_ACIDS, FIRST_LETTER, Packed
from plmsae_cli.plm.passes import Partway
from plmsae_cli.runtime.masked_scores import mask
from plmsae_cli.sae.dictionary import Dictionary

LETTERS = len(AMINO_ACIDS)


class Batch(NamedTuple):
    """Packed proteins with masked residues, and what the model predicts there untouched."""

    packed: Packed
    below: Partway
    """The pass up to the layer that is steered, with `<mask>` where predictions are read."""
    read_Q: Tensor
    """Places of the masked residues."""
    protein_Q: Tensor
    """Place of each one's protein in the batch."""
    base_QA: Tensor
    """Log-probabilities of the 20 amino acids, among themselves, float64."""


def log_letters(plm: Any, below: Partway, x_TD: Tensor, read_Q: Tensor) -> Tensor:
    """Log-probabilities [Q, 20] at places `read_Q`, `x_TD` being in the place of the layer that the pass has come to."""
    logits_QV: Tensor = plm.head(plm.above(below, x_TD)[read_Q])
    return logits_QV[:, FIRST_LETTER : FIRST_LETTER + LETTERS].double().log_softmax(-1)


def prepare(plm: Any, packed: Packed, masked_T: Tensor, layer: int) -> Batch:
    """A batch with its untouched predictions; `masked_T` marks the residues masked."""
    tokens_T = mask(packed.tokens_T, masked_T)
    read_Q = masked_T.nonzero()[:, 0]
    document_T, _ = packed.documents.locate(tokens_T.shape[0])
    below = plm.below(tokens_T, packed.documents, layer)
    return Batch(packed, below, read_Q, document_T[read_Q], log_letters(plm, below, below.x_TD, read_Q))


def steerable(batch: Batch, positions: Sequence[int] | None) -> Tensor:
    """[T, 1]: residues, or those at `positions` (from 1) of each protein."""
    residue_T = batch.packed.residue_mask_T
    if positions is not None:
        _, place_T = batch.packed.documents.locate(len(residue_T))
        wanted = torch.tensor(list(positions), device=residue_T.device)
        residue_T = residue_T & torch.isin(place_T, wanted)  # place 0 is <cls>
    return residue_T[:, None]


@torch.inference_mode()
def measure(
    plm: Any,
    sae: Dictionary,
    batch: Batch,
    steers: Sequence[Steer],
    mode: Mode,
    where_T1: Tensor,
    only_active: bool,
    check_stop: Callable[[], None] = lambda: None,
) -> Tensor:
    """[steers, variants, P, 21]: KL(untouched || steered), then the mean change of log p of each letter, by protein."""
    proteins = len(batch.packed.lengths)
    count_P1 = torch.zeros(proteins, 1, dtype=torch.float64, device=batch.base_QA.device)
    count_P1.index_add_(0, batch.protein_Q, torch.ones_like(batch.base_QA[:, :1]))
    rows = []
    for steer in steers:
        check_stop()
        for variant in VARIANTS:
            value = edit(sae, steer, variant, mode, where_T1, only_active)
            change_QA = log_letters(plm, batch.below, value(batch.below.x_TD), batch.read_Q) - batch.base_QA
            kl_Q1 = -(batch.base_QA.exp() * change_QA).sum(1, keepdim=True)
            sums_PR = torch.zeros(proteins, LETTERS + 1, dtype=torch.float64, device=change_QA.device)
            sums_PR.index_add_(0, batch.protein_Q, torch.cat([kl_Q1, change_QA], 1))
            rows.append(sums_PR / count_P1)
    return torch.stack(rows).view(len(steers), len(VARIANTS), proteins, LETTERS + 1).cpu()
