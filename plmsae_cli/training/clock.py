"""A clock that counts training alone: over all starts of a run, without compiling, validating and saving."""

from __future__ import annotations

import time

import torch


class TrainingClock:
    """Seconds that passed while it ran; on CUDA it stops only when queued work is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        return self._before + (0.0 if self._since is None else time.monotonic() - self._since)

    def run(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def pause(self) -> None:
        if self._since is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._before, self._since = self.seconds, None

    def set(self, seconds: float) -> None:
        """Continue from an earlier start's seconds."""
        self._before, self._since = seconds, None
