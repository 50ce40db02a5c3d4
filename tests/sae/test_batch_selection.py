"""Selection over a batch on several ranks against one sort of the whole batch."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.sae.batch_selection import keep_largest, nth_largest
from plmsae_cli.sae.interface import Reduce, one_process

QUICK = settings(deadline=None, max_examples=40)


def on_ranks(world: int, work: Callable[[int, Reduce], object]) -> list[object]:
    """`work(rank, reduce)` on threads that meet in `reduce`."""
    meeting = threading.Barrier(world)
    handed: list[torch.Tensor] = [torch.empty(0)] * world
    results: list[object] = [None] * world

    def run(rank: int) -> None:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            handed[rank] = tensor
            meeting.wait(240)
            total = torch.stack(handed).sum(0)
            meeting.wait(240)
            return total.to(tensor.dtype)

        try:
            results[rank] = work(rank, reduce)
        except BaseException:
            meeting.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def definition(acts_BN: torch.Tensor, wanted: int) -> torch.Tensor:
    """The first `wanted` of a stable sort of the flattened batch, without zeros."""
    order = acts_BN.flatten().argsort(descending=True, stable=True)[:wanted]
    kept = torch.zeros(acts_BN.numel(), dtype=torch.bool)
    kept[order] = True
    return kept.view_as(acts_BN) & (acts_BN > 0)


@QUICK
@given(st.data())
def test_the_largest_of_all_ranks_are_kept_in_order_of_the_global_batch(data: st.DataObject) -> None:
    world = data.draw(st.sampled_from([1, 2, 4]))
    rows, num_latents = 4 * data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    wanted = data.draw(st.integers(1, rows * num_latents + 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    levels = data.draw(st.sampled_from([1, 2, 5, 10**6]))  # few levels: most activations tie, many are 0
    acts_BN = torch.randint(-levels, levels + 1, (rows, num_latents), generator=generator).relu() / 7
    part = rows // world
    kept = on_ranks(
        world,
        lambda rank, reduce: keep_largest(
            acts_BN[rank * part : (rank + 1) * part].contiguous(), wanted, rank * part, rows, reduce
        ),
    )
    want_BN = definition(acts_BN, wanted)
    assert torch.equal(torch.cat([mask for mask, _ in kept]), want_BN)  # type: ignore[misc]
    smallest = acts_BN[want_BN].min() if want_BN.any() else torch.zeros(())
    assert all(torch.equal(least, smallest) for _, least in kept)  # type: ignore[misc]


def test_on_every_device(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    acts_BN = (torch.randn(64, 100, generator=generator).relu() * 8).round() / 8  # ties
    for wanted in (1, 77, 640, 6400):
        kept_BN, smallest = keep_largest(acts_BN.to(device), wanted, 0, 64, one_process)
        assert torch.equal(kept_BN.cpu(), definition(acts_BN, wanted)), wanted
        assert smallest.cpu() == acts_BN[kept_BN.cpu()].min()


@QUICK
@given(
    st.lists(
        st.integers(0, 2**31 - 1) | st.integers(0, 3) | st.integers(2**20 - 2, 2**20 + 2), min_size=1, max_size=30
    ),
    st.data(),
)
def test_nth_largest_is_that_of_a_sort(values: list[int], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(values)))
    found, among = nth_largest(torch.tensor(values, dtype=torch.int32), torch.tensor(n), one_process)
    best = sorted(values, reverse=True)[:n]
    assert int(found) == best[-1]
    assert int(among) == best.count(best[-1])


def test_nan_is_kept_and_never_hidden() -> None:
    acts_BN = torch.tensor([[1.0, 2.0], [float("nan"), 3.0]])
    kept_BN, _ = keep_largest(acts_BN, 2, 0, 2, one_process)
    assert kept_BN.tolist() == [[False, False], [True, True]]


def test_nothing_above_zero_keeps_nothing() -> None:
    kept_BN, smallest = keep_largest(torch.zeros(3, 5), 6, 0, 3, one_process)
    assert not kept_BN.any()
    assert smallest == 0


@pytest.mark.parametrize("k", [1, 5])
def test_exactly_b_k_are_kept_where_all_tie(k: int) -> None:
    kept_BN, _ = keep_largest(torch.ones(4, 8), 4 * k, 0, 4, one_process)
    assert kept_BN.flatten().nonzero().flatten().tolist() == list(range(4 * k))
