"""Figures of steps on their way to the host."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from plmsae_cli.runtime.device import peak_flops
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.training.agreed import Behind
from plmsae_cli.training.objective import Objective


class Line(NamedTuple):
    """What is known of a step that was asked for."""

    figures: dict[str, Any]
    skipped: list[int]
    """Those of the steps since the line before, this one included, whose gradients were not finite: they changed no weights."""


class Lines:
    """Copied asynchronously, delivered at the next call.

    Args:
        every: most steps from one line to the next.
    """

    def __init__(self, objective: Objective, gang: Gang, every: int) -> None:
        self._objective, self._gang = objective, gang
        self._waiting: tuple[dict[str, Any], list[str], list[int], Behind] | None = None
        peak = peak_flops(objective.device, objective.compute)
        self._peak = None if peak is None else peak * gang.world
        self._clock, self._waited = time.monotonic(), 0.0
        self._step: int | None = None
        self._steps: list[int] = []
        self._norms = torch.zeros(every, device=objective.device)
        """Of `_steps`, those since the last line."""

    def watch(self, step: int, figures: Mapping[str, torch.Tensor]) -> None:
        """Keep this step's gradient norm, on the device; to be called after every step."""
        self._norms[len(self._steps)].copy_(figures["grad_norm"].detach())
        self._steps.append(step)

    def add(self, step: int, figures: Mapping[str, torch.Tensor]) -> Line | None:
        """Take this step's figures; returns the line that was waiting."""
        ready = self.flush()
        names = list(figures)
        values = self._gang.sum(torch.stack([figures[name].detach().float() for name in names]))
        now = time.monotonic()
        tokens = self._objective.tokens_per_step
        line: dict[str, Any] = {"step": step, "tokens": step * tokens, **self._objective.rates(step - 1)}
        if self._step is not None:
            seconds = max(now - self._clock, 1e-9)
            pace = (step - self._step) / seconds
            line["tokens_per_second"] = round(pace * tokens)
            line["step_ms"] = round(1e3 / pace, 3)
            line["loader_share"] = round((line["loader_wait"] - self._waited) / seconds, 4)
            if self._peak is not None:
                line["mfu"] = round(pace * self._objective.flops_per_step() / self._peak, 4)
        self._clock, self._step, self._waited = now, step, line["loader_wait"]
        # Every rank knows the norm of all gradients, so all find the same steps.
        both = torch.cat([values, self._norms[: len(self._steps)]])
        self._waiting, self._steps = (line, names, self._steps, Behind(both)), []
        # On a CPU the values are there already: no reason to make the reader wait for the next line.
        return ready if values.is_cuda else self.flush()

    def flush(self) -> Line | None:
        if self._waiting is None:
            return None
        line, names, steps, both = self._waiting
        self._waiting = None
        values = both.read()
        skipped = [step for step, norm in zip(steps, values[len(names) :], strict=True) if not math.isfinite(norm)]
        return Line({**line, **dict(zip(names, values[: len(names)], strict=True))}, skipped)
