"""The training stream: step number in, rows out.

No worker processes: threads read ranges straight into a ring of buffers made once (pinned for CUDA, whose
copies run on a stream of their own). The order is a function of the step, so the only state is one integer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.blocks import Blocks
from plmsae_cli.store.fs import is_remote
from plmsae_cli.store.memory import empty_rows
from plmsae_cli.store.permutation import Permutation

_WINDOW = 1024
"""Steps whose blocks are computed at once: a permutation costs as much for a thousand values as for one."""

_AHEAD_BYTES = 160 << 20
"""Read ahead from S3: 32 ranges of 5 MB, which 50 ms to the first byte do not starve below 2 GB/s."""
_MOST_THREADS = 32


class Stream(Protocol):
    """What training reads from, step by step."""

    steps_per_epoch: int
    wait_seconds: float
    blocks: Blocks

    def rows(self, step: int) -> torch.Tensor:
        """This rank's rows [B / W, width] of `step`, on the device."""

    def block_of(self, step: int) -> int:
        """The block of B rows that the ranks read at `step`."""

    def close(self) -> None:
        """Stop reading; batches handed out are no longer valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def steps_per_epoch(num_rows: int, batch_rows: int, world: int = 1) -> int:
    """S = floor(N / B): steps of `batch_rows` (global) in one pass over `num_rows`; N mod B rows stay unseen.

    Raises:
        UserError: fewer rows than a batch, or a batch that does not split over `world` ranks.
    """
    if num_rows < batch_rows:
        raise UserError(
            f"train.batch_tokens = {batch_rows} is more than the {num_rows} rows of the dataset",
            hint=f"set train.batch_tokens to at most {num_rows}, or embed more proteins",
        )
    if batch_rows % world:
        nearest = min(max(1, round(batch_rows / world)), num_rows // world) * world
        raise UserError(
            f"train.batch_tokens = {batch_rows} does not split evenly over {world} ranks",
            hint=f"the nearest batch that does is {nearest}" if nearest else f"use at most {num_rows} ranks",
        )
    return num_rows // batch_rows


@dataclass
class _Slot:
    """One place in the ring: what threads fill, what the consumer sees, and the events between the two."""

    host_RD: torch.Tensor
    rows_RD: torch.Tensor
    """On the device; on the CPU the same tensor as `host_RD`."""
    copied: torch.cuda.Event | None = None
    """The copy into `rows_RD`: what the consumer's kernels, and the next read into `host_RD`, wait for."""
    released: torch.cuda.Event | None = None
    """The consumer's last use of `rows_RD`: what the next copy waits for."""
    stalled_seconds: float = 0.0
    """How long the last fill had to wait for the device before it could read."""


class BlockStream(Stream):
    """Batches of a dataset of blocks in training order, for one rank.

    Step s belongs to epoch e = s // S and reads block pi_e(s mod S), rank r of W its rows
    [r B / W, (r + 1) B / W). pi_0 is the identity, since the rows are shuffled already; later epochs permute
    blocks, not their contents. The order depends on nothing but (N, B, seed): not on W, threads or prefetch.

    **Lifetime of a batch.** The tensor that `rows` returns belongs to the ring and is valid until the call for the
    next-but-one batch: batch i stays untouched through call i + 1 and the use of its batch; call i + 2 gives
    the buffer back. On CUDA that call's current stream counts: work enqueued on it before the call still sees
    batch i. Clone what must live longer. One thread consumes. Asking again for the newest batch gives the same
    tensor and reads nothing: consumers that leave it as it is may take turns at each step.

    Args:
        blocks: the dataset.
        batch_rows: B, the GLOBAL batch.
        seed: orders the epochs after the first.
        rank, world: r and W.
        prefetch: steps read ahead, at least 1; by default 4, from S3 as many as make 160 MB, at most 31. The ring
            holds prefetch + 2 batches.
        device: where the batches are wanted.

    Raises:
        UserError: see `steps_per_epoch`.
    """

    def __init__(
        self,
        blocks: Blocks,
        batch_rows: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        prefetch: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(blocks.num_rows, batch_rows, world)
        self.unseen_rows = blocks.num_rows % batch_rows
        """Rows at the dataset's end that no step reads."""
        self.wait_seconds = 0.0
        """Time the consumer has waited for data since the stream was made; not its waits for a busy GPU."""
        self.blocks = blocks
        self.batch_rows = batch_rows
        self.seed = seed
        self._share_rows = batch_rows // world
        self._share_start = rank * self._share_rows
        if prefetch is None:
            wanted = _AHEAD_BYTES // (self._share_rows * blocks.width * blocks.dtype.itemsize)
            prefetch = min(max(4, wanted), _MOST_THREADS - 1) if is_remote(blocks.folder) else 4
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        self._copies = torch.cuda.Stream(self._device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._free = deque(self._new_slot() for _ in range(prefetch + 2))
        if self._copies is not None:
            # The ring may lie in memory that kernels of the current stream have not finished with.
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
        self._held: deque[_Slot] = deque()
        self._pending: deque[tuple[int, _Slot, Future[None]]] = deque()
        self._window = (0, 0, np.arange(0))
        self._newest: int | None = None
        """The step of the batch handed out last."""
        # One thread for every read that can be under way: those ahead and the one waited for.
        self._pool = ThreadPoolExecutor(prefetch + 1, thread_name_prefix="blocks")

    def _new_slot(self) -> _Slot:
        shape, dtype = (self._share_rows, self.blocks.width), self.blocks.dtype
        if not self._cuda:
            phase = 0 if is_remote(self.blocks.folder) else self.blocks.place(self._share_start)
            host_RD = empty_rows(*shape, dtype, phase)
            return _Slot(host_RD, host_RD)
        host_RD = torch.empty(shape, dtype=dtype, pin_memory=True)
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        return _Slot(host_RD, torch.empty(shape, dtype=dtype, device=self._device), copied)

    def block_of(self, step: int) -> int:
        """The block that `step` reads: rows [block B, (block + 1) B) of the dataset."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch == 0:
            return place
        window_epoch, first, order = self._window
        if epoch != window_epoch or not first <= place < first + len(order):
            first = place
            places = np.arange(first, min(first + _WINDOW, self.steps_per_epoch))
            order = Permutation(self.steps_per_epoch, self.seed, domain=f"epoch-{epoch}")(places)
            self._window = (epoch, first, order)
        return int(order[place - first])

    def rows(self, step: int) -> torch.Tensor:
        """This rank's rows [B / W, width] of `step`, on the device, in the dtype of the dataset.

        Consecutive steps are read ahead; any other step is a seek, which drops what was read ahead.

        Raises:
            StoreError: the error of the thread that read the step. The same step may be asked for again.
        """
        if step == self._newest:
            return self._held[-1].rows_RD
        self._newest = None
        if len(self._held) == 2:
            self._release(self._held.popleft())
        if self._pending and self._pending[0][0] != step:
            self._drop_pending()
        next_step = self._pending[-1][0] + 1 if self._pending else step
        while self._free:
            slot = self._free.popleft()
            start = self.block_of(next_step) * self.batch_rows + self._share_start
            self._pending.append((next_step, slot, self._pool.submit(self._fill, slot, start)))
            next_step += 1
        _, slot, filled = self._pending[0]
        begin = time.perf_counter()
        try:
            filled.result()
        except BaseException:
            self._drop_pending()
            raise
        self.wait_seconds += max(0.0, time.perf_counter() - begin - slot.stalled_seconds)
        self._pending.popleft()
        if slot.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.copied)
        self._held.append(slot)
        self._newest = step
        return slot.rows_RD

    def from_step(self, start: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(step, rows) from `start` on, without end: resuming is asking for the next step."""
        step = start
        while True:
            yield step, self.rows(step)
            step += 1

    def close(self) -> None:
        """Stop reading ahead and join the threads; batches handed out are no longer valid."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._copies is not None:
            self._copies.synchronize()

    def _fill(self, slot: _Slot, start: int) -> None:
        """In a thread: read the rows and, for CUDA, enqueue their copy."""
        if slot.copied is not None:
            begin = time.perf_counter()
            slot.copied.synchronize()
            slot.stalled_seconds = time.perf_counter() - begin
        self.blocks.read_into(start, slot.host_RD)
        if self._copies is not None and slot.copied is not None:
            if slot.released is not None:
                self._copies.wait_event(slot.released)
            with torch.cuda.stream(self._copies):
                slot.rows_RD.copy_(slot.host_RD, non_blocking=True)
            slot.copied.record(self._copies)

    def _release(self, slot: _Slot) -> None:
        if self._cuda:
            slot.released = torch.cuda.current_stream(self._device).record_event()
        self._free.append(slot)

    def _drop_pending(self) -> None:
        """Take back the buffers of the steps read ahead, once their threads have let go of them."""
        for _, slot, filled in self._pending:
            if not filled.cancel():
                filled.exception()
            self._free.append(slot)
        self._pending.clear()
