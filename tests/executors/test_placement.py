"""Groups of SAEs: everyone once, within memory, near the least possible cost."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.executors.placement import Load, allot, memory, place

LOADS = st.lists(st.builds(Load, st.integers(1, 50), st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=6)


def cost(loads: list[Load], group: list[int]) -> float:
    return sum(loads[i].cost for i in group)


@settings(deadline=None, max_examples=100)
@given(LOADS, st.integers(1, 3))
def test_the_dearest_group_is_within_grahams_bound(loads: list[Load], num_groups: int) -> None:
    groups = place(loads, num_groups, capacity=10**9)
    assert sorted(i for group in groups for i in group) == list(range(len(loads)))
    assert len(groups) == min(num_groups, len(loads))
    least = min(
        max(cost(loads, [i for i, at in enumerate(where) if at == g]) for g in range(num_groups))
        for where in product(range(num_groups), repeat=len(loads))
    )
    assert max(cost(loads, group) for group in groups) <= (4 / 3 - 1 / (3 * num_groups)) * least + 1e-9


@settings(deadline=None, max_examples=100)
@given(LOADS, st.integers(1, 3), st.integers(1, 150))
def test_memory_is_never_passed_but_by_one_that_is_too_large_alone(
    loads: list[Load], num_groups: int, capacity: int
) -> None:
    groups = place(loads, num_groups, capacity)
    assert sorted(i for group in groups for i in group) == list(range(len(loads)))
    for group in groups:
        held = sum(loads[i].held for i in group) + max(loads[i].passing for i in group)
        assert memory([loads[i] for i in group]) == held
        assert held <= capacity or len(group) == 1


def test_places_go_to_the_dearest_stream_that_can_use_them() -> None:
    one = Load(1.0, 1, 1)
    assert allot([[one] * 6, [one] * 2], 4) == [3, 1]
    assert allot([[one] * 6, [one] * 2], 1) == [1, 1], "a stream cannot wait for another's place"
    assert allot([[one], [one] * 2], 8) == [1, 2]
    assert allot([[one] * 3, [Load(9.0, 1, 1)]], 3) == [2, 1], "a single SAE is not split"


@pytest.mark.parametrize(
    ("capacity", "groups"), [(100, [[0, 1, 2, 3]]), (50, [[0, 2], [1, 3]]), (1, [[0], [1], [2], [3]])]
)
def test_more_groups_than_places_where_memory_asks_for_them(capacity: int, groups: list[list[int]]) -> None:
    loads = [Load(4, 20, 10), Load(3, 20, 10), Load(2, 20, 10), Load(3, 20, 10)]
    found = place(loads, 1, capacity)
    assert sorted(map(len, found)) == sorted(map(len, groups))
