"""Memory for rows: laid like the file it is read from, and lent again instead of allocated again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.store.memory import Buffers, empty_rows

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int8]


@settings(deadline=None, max_examples=40)
@given(count=st.integers(0, 300), width=st.integers(1, 50), dtype=st.sampled_from(DTYPES), place=st.integers(0, 10_000))
def test_rows_lie_in_a_cache_line_as_their_bytes_in_the_file(
    count: int, width: int, dtype: torch.dtype, place: int
) -> None:
    place *= dtype.itemsize  # as bytes of numbers do
    buffers = Buffers()
    for rows_RD in (empty_rows(count, width, dtype, place), buffers.rows(count, width, dtype, place)):
        assert (rows_RD.shape, rows_RD.dtype) == ((count, width), dtype)
        assert count == 0 or (rows_RD.data_ptr() - place) % 64 == 0
        rows_RD.fill_(1)
        assert rows_RD.float().sum() == count * width


def test_what_a_task_gave_back_serves_the_next_if_it_is_large_enough() -> None:
    buffers = Buffers()
    first_RD = buffers.rows(100, 8, torch.float32, 12)
    memory = first_RD.untyped_storage().data_ptr()
    lent_RD = buffers.rows(100, 8, torch.float32)
    assert lent_RD.untyped_storage().data_ptr() != memory, "lent memory is not lent twice"
    buffers.give(first_RD[3:7])
    smaller_RD = buffers.rows(90, 8, torch.bfloat16, 40)
    assert smaller_RD.untyped_storage().data_ptr() == memory
    buffers.give(smaller_RD)
    buffers.rows(101, 8, torch.float32).fill_(1)
    assert not buffers._spare, "what is too small was freed before more was taken"


@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_shards_buffers_have_some_to_spare(size: int) -> None:
    buffers = Buffers()
    taken = buffers.take(size)
    assert taken.numel() >= size
    buffers.give(taken[: size // 2])
    assert buffers.take(size - size // 20).data_ptr() == taken.data_ptr(), "shards differ a little in size"
    buffers.give(taken)
    assert buffers.take(max(1, size // 3)).data_ptr() != taken.data_ptr(), "a small one leaves a large one alone"
