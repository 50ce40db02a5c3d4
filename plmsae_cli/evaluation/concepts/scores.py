"""Precision, recall, F1, ranking curves and their intervals, from counts alone."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 256
"""Bins of activation / maximum for the ranking curves; bin 0 is exactly 0, values above the maximum fall into the last."""

_TOGETHER = 1 << 14
"""Proteins whose counts are added up together: sums of whole numbers are the same for any number."""


def f1(precision: Tensor, recall: Tensor) -> Tensor:
    """Their harmonic mean, 0 where both are 0."""
    return torch.nan_to_num(2 * precision * recall / (precision + recall), nan=0.0)


def scores(hits: Tensor, fired: Tensor, found: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and F1, float64, of broadcast counts.

    Args:
        hits: residues of the concept on which the latent fires.
        fired: residues on which it fires, of all proteins, also of those without the concept.
        found: instances hit by a residue of theirs, or, for concepts with residue recall, `hits` again.
        total: instances, or residues, of the concept.
    """
    precision = torch.nan_to_num(hits.double() / fired.double(), nan=0.0)
    recall = torch.nan_to_num(found.double() / total.double(), nan=0.0)
    return precision, recall, f1(precision, recall)


def bins(acts: Tensor, maximum: Tensor) -> Tensor:
    """Bin of each activation, int64: 0 for 0, else 1 to 255 by ceil(255 a / max), at most 255."""
    raised = torch.ceil(acts / maximum.clamp(min=torch.finfo(acts.dtype).tiny) * (BINS - 1))
    return raised.clamp(0, BINS - 1).long()


def auroc(positive_CB: Tensor, negative_CB: Tensor) -> Tensor:
    """Area under the ROC curve [C] from histograms over bins: P(positive above negative) + P(equal) / 2; NaN without either."""
    p_CB, n_CB = positive_CB.double(), negative_CB.double()
    below_CB = n_CB.cumsum(-1) - n_CB
    wins_C = (p_CB * (below_CB + n_CB / 2)).sum(-1)
    return wins_C / (p_CB.sum(-1) * n_CB.sum(-1))


def auprc(positive_CB: Tensor, negative_CB: Tensor) -> Tensor:
    """Average precision [C]: sum over bins from above of (recall gained) times precision; NaN without positives."""
    p_CB, n_CB = positive_CB.double().flip(-1), negative_CB.double().flip(-1)
    hits_CB, all_CB = p_CB.cumsum(-1), (p_CB + n_CB).cumsum(-1)
    precision_CB = torch.nan_to_num(hits_CB / all_CB, nan=0.0)
    return (p_CB * precision_CB).sum(-1) / p_CB.sum(-1)


def bootstrap_f1(counts_P4C: Tensor, draws: int, seed: int, chunk: int = 64) -> Tensor:
    """F1 [draws, C] over proteins drawn with replacement; NaN in draws without the concept.

    Args:
        counts_P4C: per protein the hits, fired, found and total of each pair (see `scores`), [P, 4, C].
        seed: of the draws; the same proteins are drawn for every pair.
    """
    generator = torch.Generator().manual_seed(seed)
    proteins, _, pairs = counts_P4C.shape
    tables = torch.split(counts_P4C.reshape(proteins, -1), _TOGETHER)
    result = []
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        drawn = torch.randint(proteins, (size, proteins), generator=generator)
        weight_QP = torch.zeros(size, proteins, dtype=torch.float64)
        weight_QP.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        weights = torch.split(weight_QP.to(counts_P4C.device), _TOGETHER, dim=1)
        sums = torch.stack([w @ table.double() for w, table in zip(weights, tables, strict=True)]).sum(0)
        hits, fired, found, total = sums.view(size, 4, pairs).unbind(1)
        result.append(torch.where(total > 0, scores(hits, fired, found, total)[2], torch.nan))
    return torch.cat(result)


def interval(drawn: Tensor) -> Tensor:
    """2.5 and 97.5 % quantiles over the first dimension, NaN left out: [2, ...]."""
    return torch.nanquantile(
        drawn.double(), torch.tensor([0.025, 0.975], dtype=torch.float64, device=drawn.device), dim=0
    )
