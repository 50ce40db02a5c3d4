"""The stream gives every row of an epoch once, in an order that depends on the step alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.blocks import Blocks, chunk_name, write_chunk, write_index
from plmsae_cli.store.fs import Store, StoreError
from plmsae_cli.training import stream as stream_module
from plmsae_cli.training.stream import BlockStream, steps_per_epoch

NUM_ROWS, D = 101, 2


@pytest.fixture(scope="module")
def blocks(folder: str) -> Blocks:
    return Blocks(Store(), folder)


class JitteryBlocks(Blocks):
    """Reads end in another order than they began."""

    def read_into(self, row_start: int, out_RD: torch.Tensor) -> None:
        time.sleep((row_start * 7919) % 5 / 1000)
        super().read_into(row_start, out_RD)


class GatedBlocks(Blocks):
    """Reads wait until the gate is open."""

    def __init__(self, store: Store, folder: str) -> None:
        super().__init__(store, folder)
        self.gate = threading.Event()
        self.reads: list[int] = []

    def read_into(self, row_start: int, out_RD: torch.Tensor) -> None:
        assert self.gate.wait(timeout=240)
        super().read_into(row_start, out_RD)
        self.reads.append(row_start)


def ids(rows_RD: torch.Tensor) -> list[int]:
    assert torch.equal(rows_RD[:, 0], -rows_RD[:, 1])
    return [int(value) for value in rows_RD[:, 0]]


def joined(batches: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


def ids_of_steps(blocks: Blocks, start: int, num_steps: int, **options: int) -> list[list[int]]:
    with BlockStream(blocks, **{"batch_rows": 8, "seed": 3, **options}) as stream:
        steps = list(islice(((step, ids(rows_RD)) for step, rows_RD in stream.from_step(start)), num_steps))
    assert [step for step, _ in steps] == list(range(start, start + num_steps))
    return [rows for _, rows in steps]


def test_consumers_that_take_turns_get_the_same_batch_of_one_reading(folder: str) -> None:
    gated = GatedBlocks(Store(), folder)
    gated.gate.set()
    with BlockStream(gated, 8, seed=3) as stream:
        for step in range(6):
            first = stream.rows(step)
            assert stream.rows(step).data_ptr() == first.data_ptr() == stream.rows(step).data_ptr()
            assert ids(stream.rows(step)) == list(range(8 * step, 8 * step + 8))
        read = list(gated.reads)
        assert len(set(read)) == len(read) >= 6, "no block is read twice"
        assert ids(stream.rows(2)) == list(range(16, 24)), "another step is a seek, as ever"


@settings(deadline=None, max_examples=25)
@given(batch=st.integers(1, NUM_ROWS), seed=st.integers(0, 2**32), prefetch=st.integers(1, 6))
def test_every_row_once_an_epoch(blocks: Blocks, batch: int, seed: int, prefetch: int) -> None:
    num_steps = NUM_ROWS // batch
    epochs = 3 if batch > 2 else 2
    batches = ids_of_steps(blocks, 0, epochs * num_steps, batch_rows=batch, seed=seed, prefetch=prefetch)
    seen = list(range(num_steps * batch))
    assert joined(batches[:num_steps]) == seen, "epoch 0 is the order on disk"
    for epoch in range(epochs):
        of_epoch = batches[epoch * num_steps : (epoch + 1) * num_steps]
        assert sorted(joined(of_epoch)) == seen
        # Later epochs move blocks, never rows between blocks.
        assert all(rows == list(range(rows[0], rows[0] + batch)) and rows[0] % batch == 0 for rows in of_epoch)


def test_epochs_and_seeds_differ(blocks: Blocks) -> None:
    num_steps = NUM_ROWS // 4
    batches = ids_of_steps(blocks, 0, 4 * num_steps, batch_rows=4)
    epochs = [batches[i * num_steps : (i + 1) * num_steps] for i in range(4)]
    assert len({str(epoch) for epoch in epochs}) == 4
    other = ids_of_steps(blocks, 0, 2 * num_steps, batch_rows=4, seed=4)
    assert other[:num_steps] == epochs[0]
    assert other[num_steps:] != epochs[1]


@settings(deadline=None, max_examples=15)
@given(world=st.sampled_from([1, 2, 4]), start=st.integers(0, 40), prefetch=st.integers(1, 5))
def test_ranks_share_the_global_batch(blocks: Blocks, world: int, start: int, prefetch: int) -> None:
    whole = ids_of_steps(blocks, start, 20)
    shares = [ids_of_steps(blocks, start, 20, rank=rank, world=world, prefetch=prefetch) for rank in range(world)]
    assert [joined(parts) for parts in zip(*shares, strict=True)] == whole


@pytest.mark.parametrize("prefetch", [1, 2, 9])
def test_order_is_independent_of_threads(folder: str, blocks: Blocks, prefetch: int) -> None:
    jittery = JitteryBlocks(Store(), folder)
    assert ids_of_steps(jittery, 5, 40, prefetch=prefetch) == ids_of_steps(blocks, 5, 40)


def test_resume_at_any_step_equals_uninterrupted(blocks: Blocks) -> None:
    whole = ids_of_steps(blocks, 0, 40)
    for start in range(40):
        assert ids_of_steps(blocks, start, 40 - start) == whole[start:]


def test_seeking_in_one_stream(blocks: Blocks) -> None:
    whole = ids_of_steps(blocks, 0, 40)
    with BlockStream(blocks, 8, seed=3) as stream:
        for step in (0, 1, 2, 30, 31, 5, 5, 6, 39, 0):
            assert ids(stream.rows(step)) == whole[step]


def test_block_of_agrees_with_rows_and_with_itself(blocks: Blocks) -> None:
    """Asked in any order, `block_of` gives the same answers; it must not depend on its cache."""
    with BlockStream(blocks, 1, seed=3, prefetch=1) as stream:
        forward = [stream.block_of(step) for step in range(3 * NUM_ROWS)]
        assert [stream.block_of(step) for step in reversed(range(3 * NUM_ROWS))] == forward[::-1]
        assert ids(stream.rows(250)) == [forward[250]]


def test_lifetime_of_a_batch(folder: str) -> None:
    """A batch survives the next call and its use, and the ring is prefetch + 2 buffers, made once."""
    with BlockStream(JitteryBlocks(Store(), folder), 4, seed=0, prefetch=3) as stream:
        expected = {step: [stream.block_of(step) * 4 + i for i in range(4)] for step in range(60)}
        pointers = set()
        previous: tuple[int, torch.Tensor] | None = None
        for step, rows_RD in islice(stream.from_step(0), 60):
            pointers.add(rows_RD.data_ptr())
            time.sleep(0.002)  # let the threads overwrite what they may
            assert ids(rows_RD) == expected[step]
            if previous is not None:
                assert ids(previous[1]) == expected[previous[0]]
            previous = step, rows_RD
        assert len(pointers) == 5


def test_errors_of_threads_reach_the_consumer(tmp_path: Path) -> None:
    index = torch.arange(32, dtype=torch.float32)
    names = [chunk_name(i) for i in range(4)]
    for name, rows_RD in zip(names, torch.stack([index, -index], dim=1).split(8), strict=True):
        write_chunk(Store(), str(tmp_path / name), rows_RD)
    write_index(Store(), str(tmp_path), names, [8] * 4, D, torch.float32)
    broken = tmp_path / names[2]
    content = broken.read_bytes()
    broken.write_bytes(content[:40])
    with BlockStream(Blocks(Store(), str(tmp_path)), 8, seed=0, prefetch=3) as stream:
        assert ids(stream.rows(0)) == list(range(8))
        assert ids(stream.rows(1)) == list(range(8, 16))
        for _ in range(8):  # more often than there are buffers: none may be lost
            with pytest.raises(StoreError, match=r"chunk-0-2\.bin"):
                stream.rows(2)
        broken.write_bytes(content)
        assert [ids(stream.rows(step))[0] for step in (2, 3)] == [16, 24]


def test_close_joins_the_threads(blocks: Blocks) -> None:
    before = set(threading.enumerate())
    stream = BlockStream(blocks, 8, seed=0, prefetch=4)
    stream.rows(0)
    started = set(threading.enumerate()) - before
    assert started
    stream.close()
    assert not any(thread.is_alive() for thread in started)


def test_wait_seconds_are_those_from_asking_until_the_rows_are_there(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that moves where rows are read, which they are not before the stream has looked at it."""
    gated, clock = GatedBlocks(Store(), folder), [0.0]

    def now() -> float:
        asked = clock[0]
        if not gated.gate.is_set():
            clock[0] += 2.5
            gated.gate.set()
        return asked

    monkeypatch.setattr(stream_module, "time", SimpleNamespace(perf_counter=now))
    with BlockStream(gated, 8, seed=0, prefetch=4) as stream:
        stream.rows(0)
        assert stream.wait_seconds == 2.5
        stream.rows(1)
        assert stream.wait_seconds == 2.5


def test_unseen_rows(blocks: Blocks) -> None:
    with BlockStream(blocks, 8, seed=0) as stream:
        assert (stream.steps_per_epoch, stream.unseen_rows) == (12, 5)


def test_fewer_rows_than_a_batch(blocks: Blocks) -> None:
    with pytest.raises(UserError) as error:
        BlockStream(blocks, 102, seed=0)
    assert str(error.value) == (
        "train.batch_tokens = 102 is more than the 101 rows of the dataset\n"
        "hint: set train.batch_tokens to at most 101, or embed more proteins"
    )


@pytest.mark.parametrize(
    ("num_rows", "batch", "world", "hint"),
    [
        (101, 9, 2, "the nearest batch that does is 8"),
        (101, 15, 4, "the nearest batch that does is 16"),
        (101, 1, 4, "the nearest batch that does is 4"),
        (15, 15, 4, "the nearest batch that does is 12"),
        (3, 3, 4, "use at most 3 ranks"),
    ],
)
def test_batches_that_do_not_split(num_rows: int, batch: int, world: int, hint: str) -> None:
    with pytest.raises(UserError) as error:
        steps_per_epoch(num_rows, batch, world)
    assert error.value.message == f"train.batch_tokens = {batch} does not split evenly over {world} ranks"
    assert error.value.hint == hint


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_batches_survive_a_busy_device(folder: str, blocks: Blocks) -> None:
    """Kernels that lag behind the host still see their own batch, and their lag is not counted as wait."""
    whole = ids_of_steps(blocks, 0, 60)
    busy_NN = torch.randn(4096, 4096, device="cuda")
    with BlockStream(JitteryBlocks(Store(), folder), 8, seed=3, device="cuda") as stream:
        kept = []
        begin = time.perf_counter()
        for _, rows_RD in islice(stream.from_step(0), 60):
            for _ in range(10):
                busy_NN @ busy_NN
            kept.append(rows_RD + 0)
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - begin
    assert [ids(rows_RD.cpu()) for rows_RD in kept] == whole
    assert stream.wait_seconds < 0.2 * elapsed
