"""Counter-based uniforms against splitmix64 in plain integers, and against what random numbers owe."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.training.counter import uniform

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15
INT64 = st.integers(-(2**63), 2**63 - 1)


def mix(x: int) -> int:
    """The finaliser of splitmix64, by its definition on unsigned 64-bit words."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def reference(index: int, *keys: int) -> float:
    state = 0
    for key in keys:
        state = mix((state + GAMMA + key) & MASK)
    return (mix((state + index * GAMMA) & MASK) >> 40) / 2**24


@settings(deadline=None, max_examples=100)
@given(st.lists(INT64, min_size=1, max_size=8), st.lists(st.integers(-(2**62), 2**62), max_size=4))
def test_it_is_splitmix64(index: list[int], keys: list[int]) -> None:
    assert uniform(torch.tensor(index), *keys).tolist() == [reference(i, *keys) for i in index]


def test_splitmix64_is_the_published_one() -> None:
    # The stream of seed 0 begins so (Vigna's splitmix64.c): without it both sides could share one mistake.
    assert [mix(GAMMA * i & MASK) for i in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_values_are_in_the_unit_interval_and_spread_over_it() -> None:
    count = 1 << 18
    values = uniform(torch.arange(count), 5, 77, 0).double()
    assert values.min() >= 0
    assert values.max() < 1
    assert values.mean() == pytest.approx(0.5, abs=4 / math.sqrt(12 * count))
    # The variance of the variance of a uniform is (1/80 - 1/144) / n.
    assert values.var() == pytest.approx(1 / 12, abs=4 * math.sqrt((1 / 80 - 1 / 144) / count))
    bins = torch.bincount((values * 256).long(), minlength=256).double()
    chi_square = ((bins - count / 256).square() / (count / 256)).sum()
    assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)


@pytest.mark.parametrize(("first", "second"), [
    ((0, 1, 0), (0, 1, 1)),  # two purposes of one step
    ((0, 1, 0), (0, 2, 0)),  # neighbouring steps
    ((0, 1, 0), (1, 0, 0)),  # seed and step exchanged
    ((0, 1, 0), (0, 1)),  # a key more
])  # fmt: skip
def test_keys_give_independent_numbers(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    count = 1 << 16
    one, two = (uniform(torch.arange(count), *keys).double() - 0.5 for keys in (first, second))
    for shift in (0, 1, -1):
        correlation = 12 * (one * two.roll(shift)).mean()
        assert abs(correlation) < 4.5 / math.sqrt(count)
    assert not torch.equal(one, two)


def test_neighbours_are_independent() -> None:
    count = 1 << 16
    values = uniform(torch.arange(count), 3, 4).double() - 0.5
    for lag in (1, 2, 64, 1024):
        assert abs(12 * (values * values.roll(lag)).mean()) < 4.5 / math.sqrt(count)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 1000), max_size=5), st.integers(0, 2**40))
def test_any_grouping_gives_the_same_numbers(cuts: list[int], start: int) -> None:
    index = torch.arange(start, start + 1000)
    whole = uniform(index, 1, 2)
    edges = [0, *sorted(cuts), 1000]
    parts = [uniform(index[a:b], 1, 2) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform(index[order], 1, 2), whole[order])
