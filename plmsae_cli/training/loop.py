"""The training loop, the same for every objective: step, log, checkpoint, stop.

Nothing in a step waits for the host: figures are copied behind the computation and written a little later, and ranks agree
on stopping through a flag that is reduced at one step and read some steps on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.faults import fault
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.runtime.metrics import open_sinks
from plmsae_cli.runtime.progress import human
from plmsae_cli.runtime.run_folder import RunFolder, write_json
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted
from plmsae_cli.store import checkpoint as checkpoints
from plmsae_cli.training.agreed import Agreed
from plmsae_cli.training.lines import Line, Lines
from plmsae_cli.training.objective import Objective
from plmsae_cli.training.profiling import NoProfile, StepProfile, TorchProfile

BEFORE = "the newest checkpoint is from before"
REMEDY = "a lower train.lr or a longer train.lr_warmup_steps usually mends it (with --restart)"
SHOWN = ("loss", "fvu", "l0", "dead", "tokens_per_second", "step_ms", "loader_share", "mfu")
"""Figures on the progress line."""


class Diverged(UserError):
    """The loss or the gradients are no longer finite."""


class Training:
    """One objective on its way to `total_steps`: its figures, its checkpoints, and where it stands.

    It continues from its newest checkpoint: `start` is the first step that it has yet to do.
    """

    def __init__(
        self, objective: Objective, total_steps: int, experiment: Experiment, run: RunFolder, gang: Gang
    ) -> None:
        assert experiment.train is not None
        self.objective, self.total_steps, self.run = objective, total_steps, run
        self.start = 0
        self.shown: Mapping[str, Any] = {}
        """The newest line, `step` and the figures in `SHOWN`; empty before the first."""
        self._options, self._gang = experiment.train, gang
        if (found := _restored(run, gang, objective.device)) is not None:
            objective.load(found.tensors, found.state)
            self.start = found.step
            if objective.over(found.step):
                self.total_steps = found.step
        self._saved = self.start
        self._sinks = open_sinks(experiment, run.path, self.start, gang.first)
        self._lines = Lines(objective, gang, experiment.train.log_every)
        self._profile: StepProfile = NoProfile()

    @property
    def reached(self) -> int:
        """The last step whose figures were seen."""
        return int(self.shown.get("step", self.start))

    def look_into_steps(self) -> bool:
        """Profile as `train.profile` asks; false where it does not."""
        if self._options.profile and self._gang.first:
            device, waited = self.objective.device, lambda: self.objective.rates(0)["loader_wait"]
            self._profile = TorchProfile(self.run.path / "profile", self.start, self.total_steps, device, waited)
        return self._options.profile

    def step(self, step: int) -> str | None:
        """A step, and its figures where they are due; what a profile found after its last step.

        Raises:
            Diverged: the loss or the gradients of a step became NaN or infinite; the last checkpoint is from before.
        """
        self._profile.before(step)
        figures = self.objective.step(step)
        seen = self._profile.after(step)
        done = step + 1
        self._lines.watch(done, figures)
        if done % self._options.log_every == 0 or done == self.total_steps or done == 1:
            self._write(self._lines.add(done, figures))
        self._validate(done)
        return seen

    def _validate(self, done: int) -> None:
        if valid := self.objective.validate(done):
            self._write(self._lines.flush())
            for sink in self._sinks:
                sink.add({"step": done, "tokens": done * self.objective.tokens_per_step, "valid": valid})

    def end_where_over(self, done: int) -> None:
        """Let this step be the last where the objective says so, validated as a last step is."""
        if self.objective.over(done) and done < self.total_steps:
            self.total_steps = done
            self._validate(done)

    def save_where_due(self, done: int) -> None:
        """A checkpoint every so many steps and after the last."""
        if done == self.total_steps or done % self._options.checkpoint_every == 0:
            self.save(done)

    def save(self, done: int) -> None:
        """A checkpoint of the state after `done` steps, unless it has one."""
        if done <= self._saved:
            return
        self._write(self._lines.flush())  # never replace a good state by one whose loss was not looked at
        state = {"tokens": done * self.objective.tokens_per_step, "world": self._gang.world}
        found = checkpoints.Checkpoint(done, self.objective.tensors(), {**state, **self.objective.state()})
        gang, keep = self._gang, self._options.keep_checkpoints
        checkpoints.save(self.run.checkpoints, found, keep, gang.rank, gang.world, gang.barrier)
        self._saved = done

    def close(self) -> None:
        self._profile.close()
        for sink in self._sinks:
            sink.close()

    def _write(self, line: Line | None) -> None:
        if line is None:
            return
        figures = line.figures
        for sink in self._sinks:
            sink.add(figures)
        if line.skipped:
            raise self._diverged(line.skipped)
        if not math.isfinite(figures["loss"]):
            raise Diverged(f"the loss was {figures['loss']} at step {figures['step']}; {BEFORE}", REMEDY)
        self.shown = {k: figures[k] for k in ("step", *SHOWN) if k in figures}

    def _diverged(self, skipped: Sequence[int]) -> Diverged:
        """The error of steps whose gradients were not finite; what they read is left in logs/not-finite.json."""
        read = {step: self.objective.read_at(step - 1) for step in skipped}
        if self._gang.first:
            write_json(self.run.path / "logs" / "not-finite.json", {"steps": read})
        more = f", as those of {len(read) - 1} more up to step {skipped[-1]}" if len(read) > 1 else ""
        return Diverged(
            f"the gradients of step {skipped[0]} were not finite{more}, so nothing was learned from {read[skipped[0]]}; {BEFORE}",
            REMEDY,
        )


def _restored(run: RunFolder, gang: Gang, device: torch.device) -> checkpoints.Restored | None:
    """The newest checkpoint that verifies, for all ranks the one that the first finds: a network disk may show others an older
    one, and ranks that go on from different steps would add up unlike gradients.

    Raises:
        UserError: on every rank, where the first can read none of those that are there.
    """
    found, failure = None, None
    if gang.first:
        try:
            found = checkpoints.load_newest(run.checkpoints)
        except UserError as error:
            failure = error
    step = (0 if found is None else found.step) if failure is None else -1
    told = torch.tensor(step if gang.first else -1, dtype=torch.int64, device=device)
    step = int(gang.maximum(told))
    if step < 0:
        raise failure or UserError(f"{run.checkpoints}: the first rank can read no checkpoint")
    return found if gang.first or step == 0 else checkpoints.load_step(run.checkpoints, step)


def fit(
    trainings: Sequence[Training],
    gang: Gang,
    progress: Callable[..., None],
    lost: Callable[[Training, Diverged], None],
) -> None:
    """Train all side by side, step by step: what they read is the same, so it is read once.

    Each becomes what it would be alone. One that is ahead, its checkpoint being newer, waits for the others. One whose
    loss or gradients are no longer finite leaves, and `lost` is told of it; where that raises, all end.

    Raises:
        Interrupted: asked to stop; checkpoints of the last step were written.
    """
    live = list(trainings)
    start, total = min(t.start for t in live), max(t.total_steps for t in live)
    stop = Agreed(gang, live[0].objective.device, STOP.requested)
    told = 0

    def each(act: Callable[[Training, int], None], done: int) -> None:
        nonlocal told
        for training in list(live):
            if not training.start < done <= training.total_steps:
                continue
            try:
                act(training, done)
            except Diverged as error:
                live.remove(training)
                training.close()
                lost(training, error)
        newest = max((training.shown["step"] for training in live if training.shown), default=0)
        if newest > told:
            told = newest
            progress(told, total, unit="steps", **_summary(live, len(trainings)))

    def advance(training: Training, done: int) -> None:
        if (seen := training.step(done - 1)) is not None:
            progress(done, total, unit="steps", note=seen)

    for training in live:
        if training.look_into_steps():
            break  # one profile at a time: what the first that asks for it sees is the step of all
    try:
        for done in range(start + 1, total + 1):
            fault("train.step", rank=gang.rank, step=done - 1)
            each(advance, done)
            if stop.asked(done):
                each(Training.save, done)
                raise Interrupted
            each(Training.end_where_over, done)
            each(Training.save_where_due, done)
            if all(training.total_steps <= done for training in live):
                break
    finally:
        for training in live:
            training.close()


def _summary(live: Sequence[Training], num: int) -> dict[str, Any]:
    """Figures of the progress line: of one, its own; of many, from the least to the largest, and the time of a step of all."""
    if num == 1:
        return {name: value for name, value in live[0].shown.items() if name != "step"}
    lines = [training.shown for training in live if training.shown]
    found: dict[str, Any] = {"SAEs": num if len(live) == num else f"{len(live)} of {num}"}
    for name in ("fvu", "l0", "dead"):
        if values := [line[name] for line in lines if name in line]:
            found[name] = " to ".join(dict.fromkeys((human(min(values)), human(max(values)))))
    found |= {name: lines[0][name] for name in ("tokens_per_second", "step_ms", "loader_share") if name in lines[0]}
    if shares := [line["mfu"] for line in lines if "mfu" in line]:
        found["mfu"] = sum(shares)
    return found
