"""What is shown while a stage is at work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors import pipeline
from plmsae_cli.executors.pipeline import run_experiment
from plmsae_cli.runtime.progress import NoReporter
from plmsae_cli.runtime.run_folder import RunFolder
from plmsae_cli.runtime.task import Plan, Task
from plmsae_cli.store.fs import Store
from plmsae_cli.store.lineage import Lineage


class Clock(NoReporter):
    """Stands at 0 s, and at a minute from the first stage's beginning on; keeps the figures of the line of progress."""

    def __init__(self) -> None:
        self.now, self.figures = 0.0, list[dict[str, Any]]()

    def monotonic(self) -> float:
        return self.now

    def begin(self, title: str) -> None:
        self.now = 60.0

    def update(self, done: float | None, total: float | None, **figures: Any) -> None:
        self.figures.append(figures)


@pytest.mark.parametrize(("price", "cost"), [(3600.0, "$60.00"), (None, None)])
def test_dollars_stand_on_the_line_of_progress_where_a_price_is_set(
    prepared: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch, price: float | None, cost: str | None
) -> None:
    """One GPU, at a dollar a second."""
    plain = prepared("priced" if cost else "free").dump()
    body = {**plain, "shuffle": None, "optimize": None, "price": {"gpu_hour": price}}
    clock = Clock()
    monkeypatch.setattr(pipeline, "count_gpus", lambda launch: 1)
    monkeypatch.setattr(pipeline, "time", clock)
    run_experiment(Experiment.model_validate(body), ["embed"], clock)
    assert clock.figures
    assert {figures.get("cost") for figures in clock.figures} == {cost}


def test_a_rank_behind_the_first_takes_no_earlier_end_of_a_run_for_its_own(
    prepared: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is about to let a finished run go on."""
    embed, trained = prepared("along").embed, list[str]()
    assert embed is not None

    def until(hours: float) -> Experiment:
        plm = {"fasta": embed.fasta, "max_hours": hours}
        train = {"kind": "plm", "batch_tokens": 16_384, "plm": plm}
        return Experiment.model_validate({"name": "run", "root": str(tmp_path), "train": train})

    run, identity = RunFolder(tmp_path / "run"), Lineage(until(2.0), Store()).run_identity()
    run.claim_identity(Lineage(until(1.0), Store()).run_identity())
    record = run.path / "parts" / "train.json"
    record.parent.mkdir()
    record.touch()
    task = Task("train", "train", (str(run.path),))
    monkeypatch.setattr(pipeline, "plan_stage", lambda *_: Plan("train", [] if record.exists() else [task], {}, {}))
    monkeypatch.setattr(pipeline, "run_task", lambda task, *_, **__: trained.append(task.id))
    monkeypatch.setattr(pipeline.time, "sleep", lambda _: run.claim_identity(identity))
    pipeline._train_along(until(2.0), Store())
    assert trained == ["train"]
    record.touch()
    pipeline._train_along(until(2.0), Store())
    assert trained == ["train"], "done, by its own record"
