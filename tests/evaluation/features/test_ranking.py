"""Lists filled a batch at a time are those of sorting everything at once."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.evaluation.features import ranking
from plmsae_cli.evaluation.features.ranking import Entries, Lists, first_entries, joined, pair_hash, strength_key
from plmsae_cli.store.permutation import counter_hash

WIDTHS = (3, 2)


def by_sorting(rows: list[tuple[int, int, int, int]], distinct: bool) -> list[tuple[int, int, int]]:
    """(list, key, row) of what is left of (list, key, row, owner)."""
    kept, owners, count = [], set(), dict[int, int]()
    for name, key, row, owner in sorted(rows):
        if (distinct and (name, owner) in owners) or count.get(name, 0) == WIDTHS[name % 2]:
            continue
        owners.add((name, owner))
        count[name] = count.get(name, 0) + 1
        kept.append((name, key, row))
    return kept


def as_rows(entries: Entries) -> list[tuple[int, int, int]]:
    place = entries.place_C.tolist()
    return [(p >> 32, p & 0xFFFFFFFF, row) for p, row in zip(place, entries.row_C.tolist(), strict=True)]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 3)), max_size=60),
    st.booleans(), st.integers(1, 7), st.integers(0, 60), st.integers(1, 40),
)  # fmt: skip
def test_batches_and_pieces_leave_the_first_of_each_list(
    drawn: list[tuple[int, int, int]], distinct: bool, batch: int, cut: int, buffer: int
) -> None:
    rows = [(name, key, row, owner) for row, (name, key, owner) in enumerate(drawn)]  # few keys: many ties
    before, ranking._BUFFER = ranking._BUFFER, buffer
    pieces = []
    for piece in (rows[:cut], rows[cut:]):
        lists = Lists(6, torch.tensor(WIDTHS), distinct)
        for start in range(0, len(piece), batch):
            columns = torch.tensor(piece[start : start + batch]).unbind(1)
            lists.offer(*columns)
        pieces.append(lists.entries())
    ranking._BUFFER = before
    assert as_rows(first_entries(joined(pieces), torch.tensor(WIDTHS), distinct)) == by_sorting(rows, distinct)


def test_keys_order_activations_and_hashes_are_the_stores() -> None:
    acts = torch.tensor([1e-38, 0.5, 3.0, 3.0000002, 1e30])
    assert strength_key(acts).tolist() == sorted(strength_key(acts).tolist(), reverse=True)
    assert (strength_key(acts) > 0).all()
    assert torch.equal(ranking.strength_of_key(strength_key(acts)), acts)
    rows, which, latents = torch.tensor([0, 7, 2**40]), torch.tensor([0, 1, 2, 2]), torch.tensor([0, 5, 5, 1_000_000])
    expected = counter_hash(3, rows[which].numpy(), latents.numpy()) >> np.uint64(32)
    assert pair_hash(3, rows, which, latents).tolist() == expected.tolist()
