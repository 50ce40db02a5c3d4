"""Host memory for rows: lent to one task after the other, and laid so that copies from files run at full speed."""

from __future__ import annotations

import threading

import numpy as np
import torch

_LINE = 64
"""Bytes of a cache line."""


def empty_rows(count: int, width: int, dtype: torch.dtype, phase: int = 0) -> torch.Tensor:
    """Room for rows [count, width] that are about to be read, contents undefined.

    `phase`: of the bytes to come, their place in the file: memory and file then lie alike within a cache line. The kernel
    copies page cache half as fast again between places that do, and at a quarter of the speed into memory that is up to a
    line behind them in its page.
    """
    return _laid(_fresh(count * width * dtype.itemsize), count, width, dtype, phase)


def _fresh(size: int) -> torch.Tensor:
    """Memory for `size` bytes and the shift to any phase.

    From numpy, which asks for huge pages where torch does not: filling it takes less than half the time, and gathering from
    it misses fewer translations.
    """
    return torch.from_numpy(np.empty(size + _LINE, np.uint8))


def _laid(memory: torch.Tensor, count: int, width: int, dtype: torch.dtype, phase: int) -> torch.Tensor:
    start = (phase - memory.data_ptr()) % _LINE
    return memory[start : start + count * width * dtype.itemsize].view(dtype).view(count, width)


class Buffers:
    """Host memory lent to tasks and taken back: fresh pages cost more than writing to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spare: list[torch.Tensor] = []

    def take(self, size: int) -> torch.Tensor:
        """At least `size` bytes (uint8), contents undefined."""
        with self._lock:
            fits = [i for i, buffer in enumerate(self._spare) if size <= buffer.numel() <= 2 * size]
            if fits:
                return self._spare.pop(min(fits, key=lambda i: self._spare[i].numel()))
        # Shards differ a little in size: with some to spare a buffer serves the others too.
        return _fresh(size + size // 16)

    def rows(self, count: int, width: int, dtype: torch.dtype, phase: int = 0) -> torch.Tensor:
        """`empty_rows` in memory that is spare, if enough is; else what is spare is freed first. For a task that holds its
        rows once: the process then holds no more than its largest task."""
        size = count * width * dtype.itemsize + _LINE
        with self._lock:
            fits = [i for i, buffer in enumerate(self._spare) if buffer.numel() >= size]
            found = self._spare.pop(fits[0]) if fits else None
            self._spare.clear()
        return _laid(_fresh(size) if found is None else found, count, width, dtype, phase)

    def give(self, lent: torch.Tensor) -> None:
        """Take back what `take` or `rows` gave, or a part of it; nobody uses it any more."""
        whole = torch.empty(0, dtype=torch.uint8).set_(lent.untyped_storage())
        with self._lock:
            self._spare.append(whole)

    def clear(self) -> None:
        """Free what is not lent."""
        with self._lock:
            self._spare.clear()


BUFFERS = Buffers()
"""The process's own."""
