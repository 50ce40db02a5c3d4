from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.training.schedules import learning_rate, sae_learning_rate, topk_learning_rate, turning_rate


def test_linear_closed_form() -> None:
    rates = [learning_rate(step, 20, 1.0, 4, 0.2) for step in range(20)]
    warm = [1 / 5, 2 / 5, 3 / 5, 4 / 5]
    assert rates == pytest.approx([*warm, *[1.0] * 12, 4 / 5, 3 / 5, 2 / 5, 1 / 5])


def test_a_fall_to_another_rate_than_zero() -> None:
    rates = [learning_rate(step, 10, 3.0, 0, 0.5, final=0.6) for step in range(10)]
    assert rates == pytest.approx([3.0] * 5 + [0.6 + 2.4 * part / 6 for part in (5, 4, 3, 2, 1)])


def test_cosine_closed_form() -> None:
    rates = [learning_rate(step, 9, 2.0, 0, 1.0, shape="cosine") for step in range(9)]
    assert rates == pytest.approx([1 + math.cos(math.pi * (step + 1) / 10) for step in range(9)])
    assert learning_rate(4, 9, 2.0, 0, 1.0, shape="cosine") == pytest.approx(1.0)


def test_constant_without_warm_up_and_decay() -> None:
    assert {learning_rate(step, 7, 0.3, 0, 0.0) for step in range(7)} == {0.3}


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.integers(0, 400), st.floats(0, 1), st.sampled_from(["linear", "cosine"]))
def test_rates_rise_then_fall_and_are_never_zero(total: int, warmup: int, decay: float, shape: str) -> None:
    rates = [learning_rate(step, total, 1.0, warmup, decay, shape=shape) for step in range(total)]  # type: ignore[arg-type]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0
    assert max(rates) <= 1


def test_rate_by_width() -> None:
    assert topk_learning_rate(2**14) == 2e-4
    assert topk_learning_rate(2**16) == 1e-4


def test_rate_by_optimizer() -> None:
    """Muon's update grows with the matrix by itself; only Adam's may be raised in short runs."""
    for width in (2**10, 2**16):
        assert sae_learning_rate("signum", width, 192, 100) == topk_learning_rate(width)
        assert sae_learning_rate("muon", width, 192, 100) == 2e-3
        assert sae_learning_rate("adam", width, 192, 100_000) == topk_learning_rate(width)


def test_short_runs_may_turn_their_rows() -> None:
    """By 10 radians a run, by .02 a step at most; where Gao et al.'s rate allows more, it holds."""
    assert sae_learning_rate("adam", 12_288, 768, 1_000) * math.sqrt(768) == pytest.approx(0.01)
    assert sae_learning_rate("adam", 12_288, 768, 100) * math.sqrt(768) == pytest.approx(0.02)
    assert sae_learning_rate("adam", 12_288, 768, 4_000) == topk_learning_rate(12_288)
    assert sae_learning_rate("adam", 16, 768, 1_000) == topk_learning_rate(16)


def test_adam_turns_a_unit_row_by_its_rate_times_the_root_of_d() -> None:
    rate, d = turning_rate(64, 100), 64
    row_D = torch.full((d,), d**-0.5, requires_grad=True)
    row_D.grad = torch.tensor([1.0, -1.0]).repeat(d // 2)  # at right angles to the row
    adam = torch.optim.Adam([row_D], lr=rate)
    for _ in range(10):
        adam.step()
    moved_D = row_D.detach() - d**-0.5
    assert float(torch.linalg.vector_norm(moved_D)) == pytest.approx(10 * 0.02, rel=1e-4)
