"""The training loop, the same for every objective: step, log, checkpoint, stop.

Nothing in a step waits for the host: figures are copied behind the computation and written a little later, and ranks agree
on stopping through a flag that is reduced at one step and read some steps on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.faults import fault
from plmsae_cli.runtime.device import peak_flops
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.runtime.metrics import open_sinks
from plmsae_cli.runtime.run_folder import RunFolder
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted
from plmsae_cli.store import checkpoint as checkpoints
from plmsae_cli.training.profiling import NoProfile, StepProfile, TorchProfile

AGREE_EVERY = 16
SHOWN = ("loss", "fvu", "l0", "dead", "tokens_per_second", "step_ms", "loader_share", "mfu")
"""Figures on the progress line."""


class Objective(Protocol):
    """What is trained. Its state after step s is a function of its state before and of s alone."""

    tokens_per_step: int
    device: torch.device
    compute: torch.dtype
    """Arithmetic of the large products."""

    def step(self, step: int) -> Mapping[str, torch.Tensor]:
        """One optimiser step; returns 0-dim figures on the device, each a rank's share of a sum over ranks."""

    def rates(self, step: int) -> Mapping[str, float]:
        """Host figures of this step that cost nothing: `lr`, and `loader_wait`, the seconds waited for data so far."""

    def flops_per_step(self) -> float:
        """Floating-point operations that the mathematics of a step needs, over all ranks."""

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Everything that must be restored, by name."""

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None: ...

    def validate(self, step: int) -> Mapping[str, Any]:
        """Figures of a validation due after this many steps, or nothing."""


class Diverged(UserError):
    """The loss is no longer finite."""


def fit(
    objective: Objective,
    total_steps: int,
    experiment: Experiment,
    run: RunFolder,
    gang: Gang,
    progress: Callable[..., None],
) -> None:
    """Train up to `total_steps`, continuing from the newest checkpoint.

    Raises:
        Interrupted: asked to stop; a checkpoint of the last step was written.
        Diverged: the loss became NaN or infinite; the last checkpoint is from before.
    """
    options = experiment.train
    assert options is not None
    start = 0
    if (found := checkpoints.load_newest(run.checkpoints)) is not None:
        objective.load(found.tensors)
        start = found.step
    sinks = open_sinks(experiment, run.path, start, gang.first)
    lines = _Lines(objective, gang)
    stop = _AgreedStop(gang, objective.device)
    profile = _profile(objective, start, total_steps, run) if options.profile and gang.first else NoProfile()
    saved = start

    def write(line: Mapping[str, Any] | None) -> None:
        if line is None:
            return
        for sink in sinks:
            sink.add(line)
        if not math.isfinite(line["loss"]):
            raise Diverged(
                f"the loss was {line['loss']} at step {line['step']}; the newest checkpoint is from before",
                "a lower train.lr or a longer train.lr_warmup_steps usually mends it (with --restart)",
            )
        shown = {k: line[k] for k in SHOWN if k in line}
        progress(line["step"], total_steps, unit="steps", **shown)

    def save(step: int) -> None:
        nonlocal saved
        write(lines.flush())  # never replace a good state by one whose loss was not looked at
        state = {"tokens": step * objective.tokens_per_step, "world": gang.world}
        found = checkpoints.Checkpoint(step, objective.tensors(), state)
        checkpoints.save(run.checkpoints, found, options.keep_checkpoints, gang.rank, gang.world, gang.barrier)
        saved = step

    try:
        for step in range(start, total_steps):
            fault("train.step", rank=gang.rank, step=step)
            profile.before(step)
            figures = objective.step(step)
            seen = profile.after(step)
            done = step + 1
            if seen is not None:
                progress(done, total_steps, unit="steps", note=seen)
            if done % options.log_every == 0 or done == total_steps or done == 1:
                write(lines.add(done, figures))
            if valid := objective.validate(done):
                write(lines.flush())
                for sink in sinks:
                    sink.add({"step": done, "tokens": done * objective.tokens_per_step, "valid": valid})
            if stop.asked(done):
                save(done)
                raise Interrupted
            if done % options.checkpoint_every == 0 and done < total_steps:
                save(done)
        write(lines.flush())
        if saved < total_steps:
            save(total_steps)
    finally:
        profile.close()
        for sink in sinks:
            sink.close()


def _profile(objective: Objective, start: int, total_steps: int, run: RunFolder) -> StepProfile:
    return TorchProfile(
        run.path / "profile", start, total_steps, objective.device, lambda: objective.rates(0)["loader_wait"]
    )


class _Behind:
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


class _Lines:
    """Figures on their way to the host: copied asynchronously, delivered at the next call."""

    def __init__(self, objective: Objective, gang: Gang) -> None:
        self._objective, self._gang = objective, gang
        self._waiting: tuple[dict[str, Any], list[str], _Behind] | None = None
        peak = peak_flops(objective.device, objective.compute)
        self._peak = None if peak is None else peak * gang.world
        self._clock, self._waited = time.monotonic(), 0.0
        self._step: int | None = None

    def add(self, step: int, figures: Mapping[str, torch.Tensor]) -> dict[str, Any] | None:
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
        self._waiting = (line, names, _Behind(values))
        # On a CPU the values are there already: no reason to make the reader wait for the next line.
        return ready if values.is_cuda else self.flush()

    def flush(self) -> dict[str, Any] | None:
        if self._waiting is None:
            return None
        line, names, values = self._waiting
        self._waiting = None
        return {**line, **dict(zip(names, values.read(), strict=True))}


class _AgreedStop:
    """All ranks stop after the same step: the wish is reduced every few steps and read at the next such step."""

    def __init__(self, gang: Gang, device: torch.device) -> None:
        self._gang, self._device = gang, device
        self._flag: _Behind | None = None

    def asked(self, step: int) -> bool:
        if self._gang.world == 1:
            return STOP.requested()
        if step % AGREE_EVERY:
            return False
        agreed = self._flag is not None and self._flag.read() == [1.0]
        # Filled on the device: a tensor made on the host would wait for the stream.
        self._flag = _Behind(self._gang.maximum(torch.full((1,), float(STOP.requested()), device=self._device)))
        return agreed
