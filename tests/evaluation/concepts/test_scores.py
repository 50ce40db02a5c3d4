"""Scores against hand-worked proteins and scikit-learn, one test for each defect known of published code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from plmsae_cli.evaluation.concepts import scores as module
from plmsae_cli.evaluation.concepts.choice import choose
from plmsae_cli.evaluation.concepts.scores import BINS, auprc, auroc, bins, bootstrap_f1, interval, scores


def test_false_positives_in_proteins_without_the_concept_count() -> None:
    # Six right of 186: two instances of three residues, all hit, and 180 residues in proteins that lack the concept.
    precision, recall, f1 = scores(*(torch.tensor(v) for v in (6, 186, 2, 2)))
    assert float(precision) == pytest.approx(6 / 186)
    assert float(recall) == 1.0
    assert float(f1) == pytest.approx(2 * (6 / 186) / (1 + 6 / 186))


def test_a_silent_latent_scores_nothing() -> None:
    assert [float(s) for s in scores(*(torch.tensor(v) for v in (0, 0, 0, 4)))] == [0.0, 0.0, 0.0]


def test_ranking_areas_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(1)
    acts = torch.rand(4000, generator=generator).where(torch.rand(4000, generator=generator) < 0.4, torch.tensor(0.0))
    truth = torch.rand(4000, generator=generator) < 0.1 + 0.5 * acts
    place = bins(acts, torch.tensor(0.9))
    assert place.min() == 0
    assert place.max() == BINS - 1
    assert torch.equal(place == 0, acts == 0)
    positive = torch.bincount(place[truth], minlength=BINS)[None]
    negative = torch.bincount(place[~truth], minlength=BINS)[None]
    assert float(auroc(positive, negative)) == pytest.approx(metrics.roc_auc_score(truth, place), abs=1e-12)
    assert float(auprc(positive, negative)) == pytest.approx(metrics.average_precision_score(truth, place), abs=1e-12)


def test_the_threshold_is_frozen_on_validation_and_only_compat_picks_it_again() -> None:
    # One latent, one concept with residue recall of 10 residues in each half.
    # Validation: threshold 0 hits 8 of 10 fired (F1 .8), threshold .15 hits 4 of 4 (F1 .571).
    # Test: threshold 0 hits 5 of 20 (F1 .333), threshold .15 hits 5 of 5 (F1 .667).
    hits = torch.zeros(1, 2, 1, 5, dtype=torch.int64)
    fired = torch.zeros(2, 1, 5, dtype=torch.int64)
    hits[0, :, 0, 0], fired[:, 0, 0] = torch.tensor([8, 5]), torch.tensor([10, 20])
    hits[0, :, 0, 1], fired[:, 0, 1] = torch.tensor([4, 5]), torch.tensor([4, 5])
    total, rankable = torch.tensor([[10, 10]]), torch.tensor([True])
    frozen = choose([(0, hits, hits)], fired, total, rankable)
    assert (int(frozen.latent_C[0]), int(frozen.threshold_C[0])) == (0, 0)
    assert frozen.f1_CH[0].tolist() == pytest.approx([0.8, 1 / 3])
    assert frozen.listed_f1_NLH[0, 0].tolist() == pytest.approx([0.8, 1 / 3])
    again = choose([(0, hits, hits)], fired, total, rankable, again=True)
    assert again.f1_CH[0].tolist() == pytest.approx([0.8, 2 / 3])
    assert again.listed_f1_NLH[0, 0].tolist() == pytest.approx([0.8, 2 / 3])


def test_each_latent_lists_its_best_concepts_in_order_and_none_it_never_hits() -> None:
    generator = torch.Generator().manual_seed(2)
    fired = torch.randint(20, 40, (2, 3, 5), generator=generator)
    hits = torch.randint(1, 20, (15, 2, 3, 5), generator=generator)
    hits[:, :, 2] = 0
    total = torch.full((15, 2), 30)
    rankable = torch.arange(15) != 4
    best = choose([(0, hits[:7], hits[:7]), (7, hits[7:], hits[7:])], fired, total, rankable)
    f1 = scores(hits, fired, hits, total[:, :, None, None])[2]
    for n in (0, 1):
        order = (
            f1[:, 0, n]
            .amax(1)
            .where(rankable, torch.tensor(-1.0, dtype=torch.float64))
            .argsort(descending=True, stable=True)
        )
        assert best.concept_NL[n].tolist() == order[:10].tolist()
        for place, c in enumerate(order[:10].tolist()):
            t = int(f1[c, 0, n].argmax())
            assert best.listed_f1_NLH[n, place].tolist() == pytest.approx(
                [float(f1[c, 0, n, t]), float(f1[c, 1, n, t])]
            )
    assert best.concept_NL[2].tolist() == [-1] * 10
    for c in range(15):
        n, t = divmod(int(f1[c, 0].flatten().argmax()), 5)
        assert (int(best.latent_C[c]), int(best.threshold_C[c])) == (n, t)


@pytest.mark.parametrize("together", [1, 4, 1000])
def test_intervals_are_those_of_drawing_proteins_one_by_one(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TOGETHER", together)
    generator = torch.Generator().manual_seed(3)
    table = torch.randint(1, 6, (9, 4, 2), generator=generator)
    drawn = bootstrap_f1(table, 200, seed=5, chunk=64)
    again = torch.Generator().manual_seed(5)
    wanted = []
    for start in range(0, 200, 64):
        for places in torch.randint(9, (min(64, 200 - start), 9), generator=again):
            sums = sum(table[int(p)] for p in places)
            wanted.append([float(scores(*sums[:, c])[2]) for c in range(2)])  # type: ignore[index]
    assert drawn.flatten().tolist() == pytest.approx(np.array(wanted).flatten().tolist(), nan_ok=True)
    assert interval(drawn)[:, 0].tolist() == pytest.approx(np.quantile(np.array(wanted)[:, 0], [0.025, 0.975]).tolist())


def test_a_draw_without_the_concept_says_nothing() -> None:
    table = torch.zeros(2, 4, 1)
    table[0, :, 0] = torch.tensor([1, 1, 1, 1])
    drawn = bootstrap_f1(table, 100, seed=0)
    assert set(drawn.nan_to_num(nan=-1.0).flatten().tolist()) == {-1.0, 1.0}
    assert math.isnan(float(drawn.amin()))
    assert interval(drawn).flatten().tolist() == [1.0, 1.0]
