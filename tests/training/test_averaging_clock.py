"""The average of the weights, the clock that counts training alone, and how far attention sees."""

from __future__ import annotations

import time

import pytest
import torch

from plmsae_cli.training.averaging import Average
from plmsae_cli.training.clock import TrainingClock
from plmsae_cli.training.schedules import window


def test_the_average_is_the_geometric_sum_and_swapping_twice_is_nothing() -> None:
    model = torch.nn.Linear(3, 2)
    history = [model.weight.detach().clone()]
    average = Average(model, 0.9)
    for step in range(4):
        with torch.no_grad():
            model.weight += step + 1
        average.update()
        history.append(model.weight.detach().clone())
    expected = 0.9**4 * history[0] + sum(0.1 * 0.9 ** (4 - i) * history[i] for i in range(1, 5))
    torch.testing.assert_close(average.tensors()["weight"], expected)
    average.swap()
    torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(average.tensors()["weight"], history[-1])
    average.swap()
    assert torch.equal(model.weight, history[-1])


def test_the_clock_counts_while_it_runs_and_goes_on_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = TrainingClock(torch.device("cpu"))
    clock.set(50.0)
    for running, seconds in ((True, 3.0), (False, 20.0), (True, 4.0), (True, 1.0)):
        clock.run() if running else clock.pause()
        now[0] += seconds
    assert clock.seconds == pytest.approx(58.0)
    clock.pause()
    clock.pause()
    now[0] += 9.0
    assert clock.seconds == pytest.approx(58.0)


def test_the_window_grows_in_four_steps_to_everything() -> None:
    seen = [window(step, 100, 1024, 2050) for step in range(100)]
    assert seen[:25] == [1024] * 25
    assert seen[25:50] == [1024 + 1026 // 3] * 25
    assert seen[50:75] == [1024 + 1026 * 2 // 3] * 25
    assert seen[75:] == [None] * 25
    assert window(0, 100, 1024, 1024) is None, "no protein is longer"
    assert window(0, 100, None, 5000) is None
