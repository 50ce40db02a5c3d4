"""Tests of effects against scipy, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.evaluation.steering.effects import benjamini_hochberg, effect_rows, paired, student_p

stats = pytest.importorskip("scipy.stats")


@settings(max_examples=60, deadline=None)
@given(st.floats(-40, 40), st.integers(1, 5000))
def test_student_is_scipys(t: float, freedom: int) -> None:
    assert student_p(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-9, abs=1e-300)


def test_paired_is_scipys_and_equal_differences_have_no_spread() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=30), draw.normal(0.3, size=30)
    size, p = paired(a, b)
    wanted = stats.ttest_rel(a, b)
    assert p == pytest.approx(wanted.pvalue, rel=1e-10)
    assert size == pytest.approx(wanted.statistic / math.sqrt(30))
    assert paired(a, a)[1] == 1.0
    assert paired(np.full(4, 2.0), np.full(4, 1.0))[1] == 0.0


def test_benjamini_hochberg_is_scipys() -> None:
    p = np.random.default_rng(1).random(200) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p), rtol=1e-12)
    # By hand: 0.01 x 3, 0.02 x 3 / 2, 0.5 x 3 / 3; the first takes the second's.
    np.testing.assert_allclose(benjamini_hochberg(np.array([0.02, 0.5, 0.01])), [0.03, 0.5, 0.03])


def test_false_discoveries_stay_rare() -> None:
    draw = np.random.default_rng(2)
    p = np.concatenate(
        [[paired(draw.normal(m, 1, 20), draw.normal(0, 1, 20))[1] for _ in range(200)] for m in (0.0, 3.0)]
    )
    found = benjamini_hochberg(p) <= 0.05
    assert found[200:].mean() > 0.95
    assert found[:200].sum() / found.sum() < 0.1


def test_rows_hold_the_controls_beside_the_effect() -> None:
    values = np.zeros((4, 3, 2))
    values[0, :, 1], values[1, :, 1], values[2, :, 1], values[3, :, 1] = [3, 4, 5], [-1, -1, -1], [0, 1, 1], [4, 4, 4]
    row = effect_rows(values, ["KL", "A"], {"latent": 7})[1]
    assert {name: row[name] for name in ("latent", "readout", "effect", "effect_sd", "flipped", "other")} == {
        "latent": 7, "readout": "A", "effect": 4.0, "effect_sd": 1.0, "flipped": -1.0, "other": 4.0,
    }  # fmt: skip
    assert row["direction"] == pytest.approx(2 / 3)
    assert row["p_other"] == 1.0
    assert row["p_null"] == pytest.approx(stats.ttest_rel([4, 4, 4], [0, 1, 1]).pvalue)
    assert row["size"] == pytest.approx((10 / 3) / math.sqrt(1 / 3))
