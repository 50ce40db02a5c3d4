from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.sae.fused.aux import compact, keep_top_
from plmsae_cli.sae.fused.dead_bound import DeadBound
from plmsae_cli.sae.selection import top_k

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("columns", "k"), [(70, 5), (64, 64), (5000, 100)])
def test_the_k_largest_stay(columns: int, k: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    acts_BC = torch.randn(3, columns, generator=generator).mul(3).round().relu().bfloat16()
    want = top_k(acts_BC.float(), k)
    kept_BC = torch.zeros(3, columns).scatter_(1, want.indices_BK, want.acts_BK)
    ours_BC = acts_BC.to(DEVICE)
    keep_top_(ours_BC, k)
    assert torch.equal(ours_BC.cpu().float(), kept_BC)


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 10))
@settings(deadline=None, max_examples=50)
def test_compaction_lists_the_set_entries_in_order(mask: list[bool], spare: int) -> None:
    places = sum(mask) + spare
    out = compact(torch.tensor(mask), places)
    assert out.tolist() == [i for i, there in enumerate(mask) if there] + [len(mask)] * spare


@given(st.integers(0, 2**32 - 1), st.integers(1, 400))
@settings(deadline=None, max_examples=30)
def test_the_bound_holds_and_continues_from_its_state(seed: int, window_steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, num_latents = 7, 600
    ages_N = torch.randint(0, 2 * window_steps * tokens, (num_latents,), generator=generator)
    bound = DeadBound(ages_N, window_steps * tokens, tokens)
    start = int(torch.randint(0, 50, (), generator=generator))
    later = start + 2 * bound.lag + 3
    for step in range(start, start + 5 * bound.lag + 5):
        if step == later:
            resumed = DeadBound(ages_N, window_steps * tokens, tokens)
            resumed.load(bound.state())
        places = bound.places(step)
        if step >= later:
            assert resumed.places(step) == places
        dead = int((ages_N >= window_steps * tokens).sum())
        assert dead <= places
        fired_N = torch.rand(num_latents, generator=generator) < 0.01
        ages_N.add_(tokens).masked_fill_(fired_N, 0)


def test_a_window_of_few_steps_is_counted_exactly() -> None:
    ages_N = torch.zeros(100, dtype=torch.int64)
    bound = DeadBound(ages_N, 15, 10)
    assert bound.places(0) == 0
    ages_N[:3] = 15
    assert 3 <= bound.places(1) < 300


def test_nothing_nearly_dead_needs_no_places() -> None:
    bound = DeadBound(torch.zeros(100, dtype=torch.int64), 10**6, 10)
    assert [bound.places(step) for step in range(3)] == [0, 0, 0]
