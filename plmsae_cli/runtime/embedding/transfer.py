"""From the device to the host beside the computation: a ring of pinned buffers, emptied by threads.

R: rows. D: dimensions.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

Deliver = Callable[[torch.Tensor], None]
"""Takes rows on the host, which are valid during the call only."""
_SLOTS = 4
_THREADS = 2


class Transfer(Protocol):
    """Where computed rows go."""

    wait_seconds: float
    """How long `send` has waited for a free buffer."""

    def send(self, rows_RD: torch.Tensor, deliver: Deliver) -> Future[None]:
        """Have the rows delivered; the future is done when they are, or holds what went wrong."""
        ...


class Direct:
    """Rows are on the host already."""

    wait_seconds = 0.0

    def send(self, rows_RD: torch.Tensor, deliver: Deliver) -> Future[None]:
        deliver(rows_RD)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class PinnedRing:
    """Copies on a stream of their own into pinned buffers; threads deliver from there. One ring serves a process."""

    def __init__(self, device: torch.device) -> None:
        self.wait_seconds = 0.0
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for _ in range(_SLOTS):
            self._free.put(torch.empty(0, dtype=torch.uint8))
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="rows")

    def send(self, rows_RD: torch.Tensor, deliver: Deliver) -> Future[None]:
        begun = time.monotonic()
        slot = self._free.get()
        self.wait_seconds += time.monotonic() - begun
        size = rows_RD.numel() * rows_RD.element_size()
        try:
            if slot.numel() < size:
                slot = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            host_RD = slot[:size].view(rows_RD.dtype).view(rows_RD.shape)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                host_RD.copy_(rows_RD, non_blocking=True)
                arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                arrived.record(self._stream)
            rows_RD.record_stream(self._stream)
        except BaseException:
            self._free.put(slot)
            raise

        def finish() -> None:
            try:
                arrived.synchronize()
                deliver(host_RD)
            finally:
                self._free.put(slot)

        return self._threads.submit(finish)


def transfer_for(device: torch.device) -> Transfer:
    return PinnedRing(device) if device.type == "cuda" else Direct()


class Stopwatch:
    """Seconds in which the device worked on the passes put between `begin` and `end`; nothing waits until asked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0
        self._begun: torch.cuda.Event | float = 0.0
        self._lock = threading.Lock()

    def begin(self) -> None:
        self._begun = self._mark()

    def end(self) -> None:
        begun, ended = self._begun, self._mark()
        if isinstance(begun, float) or isinstance(ended, float):
            assert isinstance(begun, float)
            assert isinstance(ended, float)
            self._seconds += ended - begun
        else:
            self._spans.append((begun, ended))

    def seconds(self) -> float:
        """Of all spans; waits for those that still run."""
        with self._lock:
            for begun, ended in self._spans:
                ended.synchronize()
                self._seconds += begun.elapsed_time(ended) / 1e3
            self._spans = []
            return self._seconds

    def _mark(self) -> torch.cuda.Event | float:
        if self._device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
