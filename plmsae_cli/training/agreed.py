"""Figures on their way to the host, and wishes that all ranks follow after the same step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from plmsae_cli.runtime.dist import Gang

AGREE_EVERY = 16


class Behind:
    """A tensor on its way to the host: copied behind the computation, waited for only when it is read."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._values.tolist()
        return values


class Agreed:
    """A wish of any rank that all follow after the same step: reduced every few steps and read at the next such step."""

    def __init__(self, gang: Gang, device: torch.device, wish: Callable[[], bool]) -> None:
        self._gang, self._device, self._wish = gang, device, wish
        self._flag: Behind | None = None

    def asked(self, step: int) -> bool:
        """To be called after every step by all ranks."""
        if self._gang.world == 1:
            return self._wish()
        if step % AGREE_EVERY:
            return False
        agreed = self._flag is not None and self._flag.read() == [1.0]
        # Filled on the device: a tensor made on the host would wait for the stream.
        self._flag = Behind(self._gang.maximum(torch.full((1,), float(self._wish()), device=self._device)))
        return agreed
