"""Precision at L by hand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.evaluation.contacts.precision import eligible, precision, recovered, summary


def test_only_long_range_resolved_pairs_count() -> None:
    known = np.ones(30, dtype=bool)
    known[29] = False
    pairs = list(zip(*(axis.tolist() for axis in np.nonzero(eligible(known))), strict=True))
    assert pairs == [(i, j) for i in range(30) for j in range(i + 24, 29)]


def test_precision_by_hand() -> None:
    known = np.ones(40, dtype=bool)
    known[20:30] = False  # L is 30
    score, contact = np.zeros((40, 40)), np.zeros((40, 40), dtype=bool)
    far = [(i, j) for i in range(40) for j in range(i + 24, 40) if known[i] and known[j]]
    for rank, (i, j) in enumerate(far[:30]):
        score[i, j] = 100 - rank
        contact[i, j] = rank % 3 == 0
    score[0, 1], contact[0, 1] = 1e6, True  # near: not looked at
    score[0, 25] = 1e6  # not resolved
    assert precision(score, contact, known) == {"L": 10 / 30, "L/2": 5 / 15, "L/5": 2 / 6}


@settings(max_examples=25, deadline=None)
@given(st.integers(25, 60), st.integers(0, 2**32 - 1))
def test_it_is_what_sorting_gives(length: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    score, contact, known = (
        draw.normal(size=(length, length)),
        draw.random((length, length)) < 0.3,
        draw.random(length) < 0.9,
    )
    known[[0, -1]] = True
    ranked = sorted(
        (-score[i, j], contact[i, j]) for i in range(length) for j in range(i + 24, length) if known[i] and known[j]
    )
    found = precision(score, contact, known)
    for name, part in (("L", 1), ("L/2", 2), ("L/5", 5)):
        top = [hit for _, hit in ranked[: max(1, int(known.sum()) // part)]]
        assert found[name] == pytest.approx(sum(top) / len(top))


def test_nothing_to_score_is_nan() -> None:
    assert all(
        math.isnan(v)
        for v in precision(np.zeros((20, 20)), np.zeros((20, 20), dtype=bool), np.ones(20, dtype=bool)).values()
    )


def test_what_is_recovered_and_its_intervals() -> None:
    def one(*values: float) -> dict[str, dict[str, float]]:
        return {
            name: dict.fromkeys(("L", "L/2", "L/5"), v)
            for name, v in zip(("original", "sae", "zero"), values, strict=True)
        }

    assert recovered(0.6, 0.5, 0.2) == pytest.approx(0.75)
    single = summary([one(0.6, 0.5, 0.2)], 100)["L"]
    assert single["recovered"] == pytest.approx(0.75)
    assert not any(name.startswith("interval") for name in single)
    several = summary([one(0.6, 0.5, 0.2), one(0.4, 0.2, 0.0), one(0.5, 0.1, 0.1)], 500)["L"]
    assert several["recovered"] == pytest.approx(
        (0.8 - 0.3) / (1.5 - 0.3)
    )  # the ratio of means, not the mean of ratios
    low, high = several["interval_original"]  # type: ignore[misc]
    assert 0.4 <= low < 0.5 < high <= 0.6
    assert "recovered" not in summary([one(0.3, 0.3, 0.3)], 100)["L"]
    with warnings.catch_warnings():  # draws whose ablation costs nothing are no one's warning
        warnings.simplefilter("error")
        assert "interval_recovered" not in summary([one(0.3, 0.2, 0.3), one(0.5, 0.4, 0.3)], 100)["L"]
