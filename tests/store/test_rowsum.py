"""The checksum that a shuffle must leave as it is."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.store.rowsum import hexed, joined, row_sum


def by_hand(rows_RW: np.ndarray) -> int:
    """Byte by byte."""
    column = [0] * rows_RW.shape[1]
    for row in rows_RW.tolist():
        column = [a ^ b for a, b in zip(column, row, strict=True)]
    value = 0
    for place, byte in enumerate(column):
        value ^= byte << (8 * (place % 8))
    return value


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 20), width=st.integers(1, 40), seed=st.integers(0, 99), cut=st.integers(0, 20), bit=st.data()
)
def test_any_order_and_grouping_and_any_flipped_bit(
    rows: int, width: int, seed: int, cut: int, bit: st.DataObject
) -> None:
    generator = np.random.default_rng(seed)
    rows_RW = generator.integers(0, 256, (rows, width), dtype=np.uint8)
    total = row_sum(rows_RW)
    assert total == by_hand(rows_RW)
    assert row_sum(np.ascontiguousarray(rows_RW[generator.permutation(rows)])) == total
    assert joined([hexed(row_sum(rows_RW[:cut])), hexed(row_sum(rows_RW[cut:]))]) == hexed(total)
    if rows:
        place = bit.draw(st.integers(0, rows * width * 8 - 1))
        rows_RW.reshape(-1)[place // 8] ^= 1 << (place % 8)
        assert row_sum(rows_RW) != total
