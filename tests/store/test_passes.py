"""The planner's arithmetic: against the published example, and against its own definition."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.store.passes import (
    LOCAL_READ,
    LOCAL_TASK,
    REMOTE_READ,
    REMOTE_TASK,
    RESERVE,
    ROW_OVERHEAD,
    TASKS,
    Effort,
    Passes,
    bucket_rows,
    ceil_root,
    chunks_per_task,
    divide,
    held_rows,
    num_passes,
    optimize_effort,
    shuffle_effort,
    task_memory,
    task_rows,
    usable,
    window_rows,
)

GB, TB, PB = 10**9, 10**12, 10**15


@pytest.mark.parametrize(("data", "passes"), [(100 * GB, 1), (10 * TB, 2), (1 * PB, 3), (100 * PB, 4)])
def test_published_example_100_gb_of_memory_and_files_of_1_gb(data: int, passes: int) -> None:
    assert num_passes(data, 100 * GB, 1 * GB) == passes
    if passes < 3:  # 1 PB is the most that three passes sort; the others lie at the edge of theirs
        assert num_passes(data + 1, 100 * GB, 1 * GB) == passes + 1


@pytest.mark.parametrize(
    ("held", "read", "most"),
    [(4 * GB, LOCAL_READ, 16 * TB), (16 * GB, REMOTE_READ, 64 * TB), (32 * GB, REMOTE_READ, 256 * TB)],
)
def test_two_passes_are_enough_up_to(held: int, read: int, most: int) -> None:
    assert num_passes(most, held, read) == 2
    assert num_passes(most + 1, held, read) == 3


@given(value=st.integers(1, 10**15), degree=st.integers(1, 6))
def test_roots_are_exact(value: int, degree: int) -> None:
    root = ceil_root(value, degree)
    assert root**degree >= value
    assert root == 1 or (root - 1) ** degree < value


@given(
    rows=st.integers(1, 10**14),
    row_bytes=st.integers(2, 20_000),
    memory=st.integers(1000, 10**12),
    remote=st.booleans(),
)
def test_any_division_covers_every_place_once_and_fits_the_memory(
    rows: int, row_bytes: int, memory: int, remote: bool
) -> None:
    passes = divide(rows, row_bytes, memory, remote)
    assert passes.map_rows == 1 or passes.map_rows * row_bytes <= usable(memory)
    before = None
    for level in passes.levels():
        assert level.span(0)[0] == 0
        assert level.span(level.slices - 1)[1] == rows
        assert (level.slices - 1) * level.slice_rows < rows
        assert level.slice_rows / level.bucket_rows <= 2**20
        if before is not None:
            # A task of a middle pass merges `fan` files and gets about what a map task holds.
            assert level.groups == math.ceil(before.groups / passes.fan)
            expected = rows / (level.groups * level.slices)
            assert expected <= max(passes.map_rows, 1) * 2 or expected <= 8
        before = level
    # What the last pass reads from one file is a read worth making.
    held_whole = held_rows(memory, row_bytes)
    if held_whole > 128 and rows > held_whole:
        held = held_whole * row_bytes
        wanted = min(REMOTE_READ if remote else LOCAL_READ, held // 64)
        assert held / passes.levels()[-1].groups >= wanted * 0.49


@given(
    rows=st.integers(0, 10**12),
    row_bytes=st.integers(1, 40_000),
    memory=st.integers(1, 10**12),
    chunk_rows=st.integers(1, 10**6),
    remote=st.booleans(),
)
def test_tasks_are_as_many_as_workers_may_be_and_never_tiny(
    rows: int, row_bytes: int, memory: int, chunk_rows: int, remote: bool
) -> None:
    step, held = task_rows(rows, row_bytes, memory, remote), held_rows(memory, row_bytes)
    least = REMOTE_TASK if remote else LOCAL_TASK
    assert 1 <= step <= held
    tasks = math.ceil(rows / step)
    assert tasks >= min(TASKS, rows * row_bytes // least)
    assert step * row_bytes >= least or step in (held, max(1, rows))
    if rows * row_bytes < 2 * least and rows <= held:
        assert tasks <= 1
    if rows > TASKS * held:
        assert step == held, "beyond that, as the memory says"
    chunks = chunks_per_task(rows, row_bytes, chunk_rows, memory, remote)
    assert chunks == 1 or chunks * chunk_rows <= step < (chunks + 1) * chunk_rows


@given(row_bytes=st.integers(1, 40_000), memory=st.integers(1, 10**12), rows=st.integers(0, 10**9))
def test_a_task_asks_for_what_its_rows_need(row_bytes: int, memory: int, rows: int) -> None:
    asked = task_memory(rows, row_bytes, memory)
    assert asked <= memory
    if rows <= held_rows(memory, row_bytes) and usable(memory) > row_bytes + ROW_OVERHEAD:
        assert asked - (memory - usable(memory)) == rows * (row_bytes + ROW_OVERHEAD)


@pytest.mark.parametrize("data", [1, 4, 8, 16, 64, 1000])
def test_eight_workers_are_kept_busy_whatever_the_size(data: int) -> None:
    """Rounds of a pass on 8 workers, against data that divide without end: a round more is at most an eighth of them."""
    passes = divide(data * GB // 2560, 2560, 2 * GB, remote=False)
    maps = passes.levels()[0].groups
    assert maps >= 15
    assert math.ceil(maps / 8) * 8 / maps <= 1.15


def test_ten_terabytes_at_sixteen_gigabytes() -> None:
    rows = 10 * TB // 2560
    passes = divide(rows, 2560, 16 * GB, remote=True)
    assert (passes.count, passes.levels()[0].groups) == (2, 654)  # the example's 625 at 16 GB of rows
    moved = shuffle_effort(passes, 2560, GB) + optimize_effort(passes, 2560, 196_608, 30, 16 * GB)
    assert moved.bytes_read == pytest.approx(2 * 10 * TB, rel=0.01)  # 2 R + 2 W, and eight bytes a row
    assert moved.bytes_written == pytest.approx(2 * 10 * TB, rel=0.01)
    assert moved.seconds(1e9) / 3600 == pytest.approx(5.6, abs=0.05)
    assert moved.seconds(1e9, machines=8) == moved.seconds(1e9) / 8


def test_memory_keeps_a_reserve() -> None:
    assert usable(16 * GB) == 16 * GB - RESERVE
    assert usable(1000) == 750
    assert held_rows(1000, 10_000) == 1


@settings(max_examples=30)
@given(span=st.integers(0, 10**14))
def test_buckets_are_powers_of_two_and_their_tables_small(span: int) -> None:
    size = bucket_rows(span)
    assert size >= 1024
    assert size & (size - 1) == 0
    assert span / size <= 2**20
    assert size == 1024 or span / size > 2**19


def test_efforts_add_up() -> None:
    both = Effort(1, 2, 3, 4, 5, 6) + Effort(10, 20, 30, 40, 50, 3)
    assert both == Effort(11, 22, 33, 44, 55, 6)
    assert Passes(10, 10, 0, 0, 1024).count == 2


@given(memory=st.integers(1, 1 << 40), row_bytes=st.integers(1, 40_000), files=st.integers(1, 5000))
def test_windows_read_efficiently_where_memory_allows(memory: int, row_bytes: int, files: int) -> None:
    held, window = held_rows(memory, row_bytes), window_rows(memory, row_bytes, files)
    assert 1 <= window <= held
    if window < held:
        of_a_file = (window + 1) * (row_bytes + ROW_OVERHEAD) / files
        assert of_a_file >= 4e6, "a larger window would not read better"
