"""Stochastic rounding: the stated definition bit for bit, unbiased, deterministic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.training.rounding import mix, random16, stochastic_bfloat16

WORDS = st.integers(0, 2**32 - 1)


def mix_of(h: int) -> int:
    """The definition in unbounded integers."""
    h ^= h >> 16
    h = h * 0x7FEB352D % 2**32
    h ^= h >> 15
    h = h * 0x846CA68B % 2**32
    return h ^ h >> 16


def words(*values: int) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.uint32).view(np.int32))


def index_of(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


@settings(deadline=None, max_examples=50)
@given(st.lists(WORDS, min_size=1, max_size=40), WORDS, st.integers(0, 1000))
def test_bits_are_those_of_the_definition(index: list[int], step: int, salt: int) -> None:
    (step_0,) = words(step).unbind()
    key = mix_of(mix_of(salt) ^ step)
    assert random16(words(*index), step_0, salt).tolist() == [mix_of(key ^ i) >> 16 for i in index]


def test_mix_is_a_bijection() -> None:
    """Distinct inputs stay distinct, and small ones fill all bits evenly."""
    mixed = mix(index_of(2**16)).numpy().view(np.uint32)
    assert len(np.unique(mixed)) == 2**16
    ones = ((mixed[:, None] >> np.arange(32, dtype=np.uint32)) & 1).mean(0)
    assert np.abs(ones - 0.5).max() < 6 * 0.5 / math.sqrt(2**16)


@settings(deadline=None, max_examples=50)
@given(st.floats(width=32, allow_nan=False, min_value=-(2.0**126), max_value=2.0**126), st.integers(0, 2**31 - 1))
def test_the_result_is_a_neighbour_and_exact_values_stay(value: float, step: int) -> None:
    x = torch.full((64,), value)
    rounded = stochastic_bfloat16(x, index_of(64), torch.tensor(step, dtype=torch.int32), 3).double()
    down = (x.view(torch.int32) & -65536).view(torch.float32)
    up = ((x.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert bool(((rounded == down) | ((rounded == up) & (x != down))).all())


def test_infinities_and_zeros_stay() -> None:
    x = torch.tensor([math.inf, -math.inf, 0.0, -0.0])
    for step in range(20):
        rounded = stochastic_bfloat16(x, index_of(4), torch.tensor(step, dtype=torch.int32), 0)
        assert torch.equal(rounded.float(), x)


@pytest.mark.parametrize("value", [1.001, -1.0031, 3.3e-12, 7.77e20])
def test_the_mean_is_the_value(value: float) -> None:
    """Over elements and over steps: the error of a mean of n lies within five standard errors, at most ulp / 2 sqrt(n)."""
    count = 40_000
    ulp = 2.0 ** (math.floor(math.log2(abs(value))) - 7)
    exact = float(torch.tensor(value))
    along_index = stochastic_bfloat16(
        torch.full((count,), value), index_of(count), torch.tensor(5, dtype=torch.int32), 1
    )
    assert abs(float(along_index.double().mean()) - exact) < 5 * ulp / 2 / math.sqrt(count)
    one = torch.full((1,), value)
    along_steps = torch.cat(
        [stochastic_bfloat16(one, index_of(1), torch.tensor(s, dtype=torch.int32), 1) for s in range(4000)]
    )
    assert abs(float(along_steps.double().mean()) - exact) < 5 * ulp / 2 / math.sqrt(4000)


def test_steps_salts_and_elements_are_independent_and_repeat() -> None:
    def draw(step: int, salt: int) -> torch.Tensor:
        return random16(index_of(20_000), torch.tensor(step, dtype=torch.int32), salt).double()

    first = draw(1, 0)
    assert torch.equal(first, draw(1, 0))
    for other in (draw(2, 0), draw(1, 1), first.roll(1)):
        both = torch.stack([first, other])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / math.sqrt(20_000)


def test_an_average_with_decay_999_reaches_the_mean_where_rounding_to_nearest_freezes() -> None:
    """From 1 towards 1.5: a step is 5e-4, an eighth of bfloat16's half unit."""
    count, steps, beta, target = 512, 8000, 0.999, 1.5
    stochastic = torch.ones(count, dtype=torch.bfloat16)
    nearest = stochastic.clone()
    index = index_of(count)
    for step in range(steps):
        average = stochastic.float() * beta + target * (1 - beta)
        stochastic = stochastic_bfloat16(average, index, torch.tensor(step, dtype=torch.int32), 0)
        nearest = (nearest.float() * beta + target * (1 - beta)).to(torch.bfloat16)
    assert bool((nearest == 1).all())
    # Stationary deviation of one element: ulp / 2 * sqrt(1 / (1 - beta^2)) at most.
    deviation = 2.0**-8 * math.sqrt(1 / (1 - beta**2))
    assert abs(float(stochastic.double().mean()) - target) < 5 * deviation / math.sqrt(count)
    assert float((stochastic.double() - target).abs().max()) < 6 * deviation
