"""What is shown while a stage is at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors import pipeline
from plmsae_cli.executors.pipeline import run_experiment
from plmsae_cli.runtime.progress import NoReporter


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
