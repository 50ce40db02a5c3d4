"""The entropy of a batch's sources: its ends, its expectation, and what a bad order would show."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plmsae_cli.store.permutation import Permutation
from plmsae_cli.training.mixing import SEGMENTS, BatchEntropy, entropy


def test_ends() -> None:
    assert entropy(np.zeros(100, dtype=np.int64), 6400) == 0.0
    assert entropy(np.arange(6400), 6400) == 1.0
    assert entropy(np.arange(1), 1) == 1.0
    assert entropy(np.arange(10), 10) == 1.0, "fewer rows than segments"
    assert entropy(np.concatenate([np.arange(100), 3200 + np.arange(100)]), 6400) == pytest.approx(
        math.log(2) / math.log(SEGMENTS), abs=1e-4
    )


def test_shuffled_batches_have_what_uniform_draws_have() -> None:
    n, batch = 1 << 17, 2048
    found = BatchEntropy(n, 5, batch, lambda step: step)
    with found:
        values = [found(step) for step in range(20)]
    expected = 1 - (SEGMENTS - 1) / (2 * batch * math.log(SEGMENTS))
    assert np.mean(values) == pytest.approx(expected, abs=5e-4)
    assert min(values) > 0.99
    assert entropy(np.arange(batch), n) < 0.1, "what unshuffled rows would have"


def test_asked_ahead_or_not_it_is_a_function_of_the_step() -> None:
    n, batch = 5000, 128
    order = Permutation(n, 9, domain="shuffle")

    def direct(step: int) -> float:
        return entropy(order.inverse(np.arange(step * batch, (step + 1) * batch)), n)

    with BatchEntropy(n, 9, batch, lambda step: step % 30) as ahead:
        regular = [ahead(step) for step in (0, 9, 18, 27, 27, 30)]
    with BatchEntropy(n, 9, batch, lambda step: step % 30) as seeking:
        again = [seeking(step) for step in (30, 27, 0, 18, 9)]
    assert regular == [again[2], again[4], again[3], again[1], again[1], again[0]]
    assert regular == [direct(step % 30) for step in (0, 9, 18, 27, 27, 30)]
