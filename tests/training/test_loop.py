"""The loop with an objective that only counts: which steps are logged, saved, stopped at, and what a NaN leaves."""

from __future__ import annotations

import gzip
import json
import math
import time
from collections.abc import Collection, Mapping
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.faults import InjectedFault
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.runtime.run_folder import RunFolder
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted
from plmsae_cli.store.checkpoint import load_newest
from plmsae_cli.training import lines as lines_module
from plmsae_cli.training import loop
from plmsae_cli.training.lines import Lines
from plmsae_cli.training.loop import Diverged, Training, fit


class Counting:
    """Its state is the sum of its steps; the loss of a step is a number of its own, NaN from `bad` on; `wild` steps have infinite
    gradients."""

    tokens_per_step = 100
    device = torch.device("cpu")
    compute = torch.float32

    def __init__(self, bad: int | None = None, stop: int | None = None, wild: Collection[int] = ()) -> None:
        self.total = torch.zeros(3)
        self.bad, self.stop, self.wild = bad, stop, wild
        self.steps: list[int] = []
        self.waited = 0.0

    def step(self, step: int) -> Mapping[str, torch.Tensor]:
        self.steps.append(step)
        if step == self.stop:
            STOP.request()
        self.total += step + 1
        failed = self.bad is not None and step >= self.bad
        return {
            "loss": torch.tensor(math.nan if failed else 1.0 / (step + 1)),
            "grad_norm": torch.tensor(math.inf if step in self.wild else 1.0),
            "total": self.total[0].clone(),
        }

    def rates(self, step: int) -> Mapping[str, float]:
        return {"lr": 0.1 * step, "loader_wait": self.waited}

    def read_at(self, step: int) -> str:
        return f"number {step}"

    def flops_per_step(self) -> float:
        return 5e9

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"total": self.total}

    def state(self) -> Mapping[str, Any]:
        return {}

    def load(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        self.total.copy_(tensors["total"])

    def validate(self, step: int) -> Mapping[str, Any]:
        return {"random": {"loss": float(step)}} if step % 6 == 0 else {}

    def over(self, step: int) -> bool:
        return False


def train(
    folder: Path, objective: Counting, steps: int = 20, notes: list[str] | None = None, **train: Any
) -> list[tuple[float, float]]:
    """Run the loop; returns the progress that was shown, and adds what was said to `notes`."""
    body = {"kind": "plm", "plm": {"fasta": "a.fasta"}, "batch_tokens": 16_384, **train}
    options = {"log_every": 4, "checkpoint_every": 5}
    experiment = Experiment.model_validate({"name": "run", "root": str(folder), "train": {**options, **body}})
    shown: list[tuple[float, float]] = []
    run = RunFolder(folder / "run")

    def progress(done: float, total: float, note: str | None = None, **figures: Any) -> None:
        if note is None:
            shown.append((done, total))
        elif notes is not None:
            notes.append(note)

    def lost(training: Training, error: Diverged) -> None:
        raise error

    fit([Training(objective, steps, experiment, run, Gang())], Gang(), progress, lost)
    return shown


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def saved(folder: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (folder / "run" / "checkpoints").glob("step-*"))


def test_first_last_and_every_nth_step_are_logged(tmp_path: Path) -> None:
    objective = Counting()
    shown = train(tmp_path, objective, steps=18)
    assert objective.steps == list(range(18))
    figures = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in figures] == [1, 4, 8, 12, 16, 18]
    assert [step for step, _ in shown] == [1, 4, 8, 12, 16, 18]
    for line in figures:
        step = line["step"]
        assert line["tokens"] == 100 * step
        assert line["loss"] == pytest.approx(1.0 / step)
        assert line["total"] == step * (step + 1) / 2, "a line's figures are of its own step"
        assert line["lr"] == pytest.approx(0.1 * (step - 1))
    valid = [line for line in lines(tmp_path) if "valid" in line]
    assert [(line["step"], line["tokens"], line["valid"]["random"]["loss"]) for line in valid] == [
        (6, 600, 6.0), (12, 1200, 12.0), (18, 1800, 18.0)
    ]  # fmt: skip
    assert [line["step"] for line in lines(tmp_path)] == sorted(line["step"] for line in lines(tmp_path))
    assert saved(tmp_path) == [15, 18]


def test_a_finished_run_starts_no_step(tmp_path: Path) -> None:
    train(tmp_path, Counting(), steps=20)
    before = lines(tmp_path)
    again = Counting()
    train(tmp_path, again, steps=20)
    assert again.steps == []
    assert again.total[0] == 210
    assert lines(tmp_path) == before


def test_a_stop_is_obeyed_after_its_step_and_saved(tmp_path: Path) -> None:
    whole = Counting()
    train(tmp_path / "whole", whole)
    with pytest.raises(Interrupted):
        train(tmp_path, Counting(stop=10))
    found = load_newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert (found.step, float(found.tensors["total"][0])) == (11, 66.0)
    assert found.state["tokens"] == 1100
    STOP.asked = False
    rest = Counting()
    train(tmp_path, rest)
    assert rest.steps == list(range(11, 20))
    assert torch.equal(rest.total, whole.total)
    ours, theirs = lines(tmp_path), lines(tmp_path / "whole")
    for line in (*ours, *theirs):
        for clock in ("tokens_per_second", "step_ms", "loader_share"):
            line.pop(clock, None)
    assert ours == theirs


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_loss_that_is_not_finite_ends_it_and_is_never_saved_over_a_good_state(tmp_path: Path, log_every: int) -> None:
    with pytest.raises(Diverged, match=r"nan at step 10; the newest checkpoint is from before"):
        train(tmp_path, Counting(bad=9), log_every=log_every)
    assert saved(tmp_path) == [5]
    assert lines(tmp_path)[-1]["step"] == 10
    assert lines(tmp_path)[-1]["loss"] is None


@pytest.mark.parametrize(
    ("wild", "told"), [((6,), "step 7 were"), ((6, 8, 9), "step 7 were not finite, as those of 2 more up to step 10")]
)
def test_gradients_that_are_not_finite_end_it_at_steps_that_are_not_logged_too(
    tmp_path: Path, wild: tuple[int, ...], told: str
) -> None:
    with pytest.raises(Diverged, match=told) as caught:
        train(tmp_path, Counting(wild=wild), log_every=10, checkpoint_every=4)
    assert "from number 6;" in str(caught.value)
    assert lines(tmp_path)[-1]["step"] == 10
    read = json.loads((tmp_path / "run" / "logs" / "not-finite.json").read_text())
    assert read == {"steps": {str(step + 1): f"number {step}" for step in wild}}


def test_a_fault_can_be_placed_by_rank_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLMSAE_FAULT", "raise:train.step:rank=0,step=7")
    objective = Counting()
    with pytest.raises(InjectedFault):
        train(tmp_path, objective)
    assert objective.steps == list(range(7))
    monkeypatch.setenv("PLMSAE_FAULT", "raise:train.step:rank=1,step=8")
    train(tmp_path, objective)


class Slow(Counting):
    """A step takes 20 ms, of which 15 ms were spent waiting for data."""

    def step(self, step: int) -> Mapping[str, torch.Tensor]:
        time.sleep(0.02)
        self.waited += 0.015
        return super().step(step)


def test_a_line_says_how_long_a_step_took_and_for_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device of 1 TFLOP/s, 5 GFLOP in 20 ms are a quarter."""
    monkeypatch.setattr(lines_module, "peak_flops", lambda device, compute: 1e12)
    begun = time.monotonic()
    train(tmp_path, Slow(), steps=8, checkpoint_every=100)
    elapsed = time.monotonic() - begun
    first, *rest = (line for line in lines(tmp_path) if "loss" in line)
    assert not {"tokens_per_second", "step_ms", "loader_share", "mfu"} & first.keys()
    three, four = (line["step_ms"] / 1e3 for line in rest)
    assert 3 * three + 4 * four < elapsed
    for line in rest:
        seconds = line["step_ms"] / 1e3
        assert seconds >= 0.0199, "a busy machine may sleep longer, never shorter"
        assert line["tokens_per_second"] == pytest.approx(100 / seconds, abs=1)
        assert line["loader_share"] == pytest.approx(0.015 / seconds, abs=1e-3)
        assert line["mfu"] == pytest.approx(5e9 / seconds / 1e12, abs=1e-3)


def test_the_peak_is_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four devices of 1 TFLOP/s, 5 GFLOP in 20 ms are a sixteenth."""
    monkeypatch.setattr(lines_module, "peak_flops", lambda device, compute: 1e12)
    ticks = count(0.0, 0.02)
    monkeypatch.setattr(lines_module, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    gang = cast(Gang, SimpleNamespace(world=4, sum=lambda tensor: tensor))
    found = Lines(Counting(), gang, 1)
    first, second = (found.add(step, {"loss": torch.tensor(1.0)}) for step in (1, 2))
    assert first is not None
    assert second is not None
    assert "mfu" not in first.figures
    assert second.figures["mfu"] == pytest.approx(1 / 16)


def test_without_a_known_peak_there_is_no_mfu(tmp_path: Path) -> None:
    train(tmp_path, Counting(), steps=8)
    assert not any("mfu" in line for line in lines(tmp_path))


@pytest.mark.parametrize(("steps", "seen"), [(30, (11, 20)), (15, (6, 15)), (4, (1, 4))])
def test_a_profile_names_its_steps_and_changes_nothing(tmp_path: Path, steps: int, seen: tuple[int, int]) -> None:
    plain, profiled = Counting(), Counting()
    train(tmp_path / "plain", plain, steps=steps)
    notes: list[str] = []
    train(tmp_path, profiled, steps=steps, notes=notes, profile=True)
    assert torch.equal(plain.total, profiled.total)
    (note,) = notes
    assert note.startswith(f"profile of steps {seen[0]} to {seen[1]}: ")
    assert "% of the CPU time" in note
    folder = tmp_path / "run" / "profile"
    assert "aten::add_" in (folder / "table.txt").read_text()
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    added = [event for event in trace["traceEvents"] if event.get("name") == "aten::add_"]
    assert len(added) == seen[1] - seen[0] + 1
    assert not (tmp_path / "plain" / "run" / "profile").exists()


def test_a_run_stopped_inside_a_profile_goes_on(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, Counting(stop=12), steps=40, profile=True)
    STOP.asked = False
    notes: list[str] = []
    train(tmp_path, Counting(), steps=40, notes=notes, profile=True)
    assert [note.splitlines()[0].split(":")[0] for note in notes] == ["profile of steps 24 to 33"]


class Second(Gang):
    """A rank that hears the step that the first one has chosen."""

    def __init__(self, told: int) -> None:
        super().__init__(1, 2)
        object.__setattr__(self, "told", told)

    def maximum(self, tensor: torch.Tensor) -> torch.Tensor:
        assert int(tensor) < 0, "the others have no say"
        return torch.tensor(vars(self)["told"])


def test_all_ranks_go_on_from_the_checkpoint_that_the_first_has_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, Counting(), steps=20, keep_checkpoints=3)
    run, device = RunFolder(tmp_path / "run"), torch.device("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", lambda *_: iter(()))  # as a network disk may show another machine
        found = loop._restored(run, Second(20), device)
        assert loop._restored(run, Second(0), device) is None
    assert found is not None
    assert (found.step, found.tensors["total"].tolist()) == (20, [210.0] * 3)
    # The newest is damaged: the first takes the one before, and so do the others, whatever they can read.
    newest = run.checkpoints / "step-00000020" / "rank-0.safetensors"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-1])
    first = loop._restored(run, Gang(), device)
    newest.write_bytes(whole)
    assert first is not None
    found = loop._restored(run, Second(first.step), device)
    assert found is not None
    assert found.step == first.step == 15
    with pytest.raises(UserError, match="first rank can read no checkpoint"):
        loop._restored(run, Second(-1), device)
    with pytest.raises(FileNotFoundError):  # no user's error: it ends the gang
        loop._restored(run, Second(7), device)
