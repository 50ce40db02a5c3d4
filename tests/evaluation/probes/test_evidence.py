"""Intervals of a probe's AUROC, and labels that say nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from plmsae_cli.evaluation.probes.evidence import auroc_interval, permuted, rotated


def test_the_interval_is_that_of_proteins_drawn_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (25,), generator=generator)
    protein_R = torch.arange(25).repeat_interleave(lengths)
    y_R = torch.rand(len(protein_R), generator=generator) < 0.3
    # Rounded, so that scores tie; each protein has a shift of its own, so that its residues are not independent.
    shift_P = torch.randn(25, generator=generator)
    score_R = (torch.randn(len(protein_R), generator=generator) + y_R + shift_P[protein_R]).mul(4).round().double()
    found = auroc_interval(score_R, y_R, protein_R, 1000)
    assert found is not None
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(400):
        rows = torch.cat([(protein_R == p).nonzero()[:, 0] for p in rng.integers(25, size=25)])
        areas.append(roc_auc_score(y_R[rows], score_R[rows]))
    ends = np.quantile(areas, [0.025, 0.975])
    assert found == pytest.approx(ends, abs=0.2 * (ends[1] - ends[0]))
    assert auroc_interval(score_R[y_R], y_R[y_R], protein_R[y_R], 50) is None, "without negatives there is no area"


def test_rotated_labels_keep_number_and_neighbourhood_within_each_protein() -> None:
    lengths = torch.tensor([1, 6, 9])
    hashes = np.array([11, 22, 33], dtype=np.uint64)
    y_R = torch.zeros(16, dtype=torch.bool)
    y_R[0] = y_R[2:4] = y_R[12:15] = True
    moved_R = rotated(y_R, lengths, hashes)
    for begin, length in ((0, 1), (1, 6), (7, 9)):
        before, after = (labels[begin : begin + length].tolist() for labels in (y_R, moved_R))
        turns = [before[-s:] + before[:-s] for s in range(1, length)] or [before]
        assert after in turns
    assert torch.equal(rotated(y_R, lengths, hashes), moved_R)


def test_permuted_labels_are_the_same_ones_elsewhere() -> None:
    y_P = torch.arange(100) < 30
    assert int(permuted(y_P).sum()) == 30
    assert not torch.equal(permuted(y_P), y_P)
