"""How sure a probe's figures are: intervals over proteins, and labels that say nothing.

Letters: R rows, U distinct scores, Q draws, P proteins.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from plmsae_cli.evaluation.concepts.labelling import ROTATION_SEED
from plmsae_cli.evaluation.concepts.scores import auroc, interval
from plmsae_cli.evaluation.probes.planning import CELLS
from plmsae_cli.store.permutation import counter_hash

SEED = 0


def auroc_interval(score_R: Tensor, y_R: Tensor, protein_R: Tensor, draws: int) -> list[float] | None:
    """2.5 and 97.5 % of the area under the ROC curve over proteins drawn with replacement, ties counted half.

    Draws without positives or without negatives are left out; None where no draw has both.

    Args:
        protein_R: of each row, from 0.
    """
    proteins = int(protein_R.max()) + 1
    _, place_R = torch.unique(score_R, return_inverse=True)
    count = int(place_R.max()) + 1
    generator = torch.Generator().manual_seed(SEED)
    step = max(1, min(draws, CELLS // max(count, len(score_R), proteins)))
    areas = []
    for start in range(0, draws, step):
        size = min(step, draws - start)
        drawn_QP = torch.randint(proteins, (size, proteins), generator=generator)
        weight_PQ = torch.zeros(size, proteins).scatter_add_(1, drawn_QP, torch.ones(size, proteins)).T
        positive_UQ, negative_UQ = (
            torch.zeros(count, size).index_add_(0, place_R[side_R], weight_PQ[protein_R[side_R]])
            for side_R in (y_R, ~y_R)
        )
        areas.append(auroc(positive_UQ.T, negative_UQ.T))
    found = interval(torch.cat(areas)).tolist()
    return found if found[0] == found[0] else None


def rotated(y_R: Tensor, lengths_P: Tensor, hashes_P: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> Tensor:
    """Labels of residues, shifted along each protein round its end by a keyed hash: as the concept test's null has them."""
    length_R = lengths_P.repeat_interleave(lengths_P)
    begin_R = (lengths_P.cumsum(0) - lengths_P).repeat_interleave(lengths_P)
    room_P = np.maximum(lengths_P.numpy() - 1, 1).astype(np.uint64)
    shift_P = torch.from_numpy((counter_hash(ROTATION_SEED, hashes_P) % room_P).astype(np.int64)) + 1
    place_R = torch.arange(len(y_R)) - begin_R
    return y_R[begin_R + (place_R - shift_P.repeat_interleave(lengths_P)) % length_R]


def permuted(y_P: Tensor) -> Tensor:
    """Labels of proteins, dealt out anew."""
    return y_P[torch.randperm(len(y_P), generator=torch.Generator().manual_seed(SEED))]
