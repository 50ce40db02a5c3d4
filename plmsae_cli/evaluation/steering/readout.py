"""What steering does to the predictions at masked residues of many proteins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plmsae_cli.evaluation.steering.edits import VARIANTS, Mode, Steer, edit
from plmsae_cli.plm.alphabet import AMINO_ACIDS, FIRST_LETTER, MASK, Packed
from plmsae_cli.sae.dictionary import Dictionary

LETTERS = len(AMINO_ACIDS)


class Batch(NamedTuple):
    """Packed proteins with masked residues, and what the model predicts there untouched."""

    tokens_T: Tensor
    """`<mask>` where predictions are read."""
    packed: Packed
    read_Q: Tensor
    """Places of the masked residues."""
    protein_Q: Tensor
    """Place of each one's protein in the batch."""
    base_QA: Tensor
    """Log-probabilities of the 20 amino acids, among themselves, float64."""


def log_letters(plm: Any, batch: Batch | tuple[Tensor, Packed, Tensor], layer: int, value: Any = None) -> Tensor:
    """Log-probabilities [Q, 20] at the masked residues, layer `layer` replaced by `value` of it, all later ones anew."""
    tokens_T, packed, read_Q = batch[:3]
    splice = None if value is None else {layer: value}
    logits_TV: Tensor = plm(tokens_T, packed.documents, splice=splice, logits=True).logits
    return logits_TV[read_Q, FIRST_LETTER : FIRST_LETTER + LETTERS].double().log_softmax(-1)


def prepare(plm: Any, packed: Packed, masked_T: Tensor, layer: int) -> Batch:
    """A batch with its untouched predictions; `masked_T` marks the residues masked."""
    tokens_T = packed.tokens_T.long().masked_fill(masked_T, MASK)
    read_Q = masked_T.nonzero()[:, 0]
    document_T, _ = packed.documents.locate(tokens_T.shape[0])
    base_QA = log_letters(plm, (tokens_T, packed, read_Q), layer)
    return Batch(tokens_T, packed, read_Q, document_T[read_Q], base_QA)


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
    layer: int,
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
            change_QA = log_letters(plm, batch, layer, value) - batch.base_QA
            kl_Q1 = -(batch.base_QA.exp() * change_QA).sum(1, keepdim=True)
            sums_PR = torch.zeros(proteins, LETTERS + 1, dtype=torch.float64, device=change_QA.device)
            sums_PR.index_add_(0, batch.protein_Q, torch.cat([kl_Q1, change_QA], 1))
            rows.append(sums_PR / count_P1)
    return torch.stack(rows).view(len(steers), len(VARIANTS), proteins, LETTERS + 1).cpu()
