"""Progress for logs: few lines, and an estimate from the pace so far."""

from __future__ import annotations

import time

import pytest

from plmsae_cli.runtime import progress


def test_progress_lines_come_only_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    shown = progress.PlainReporter()
    shown.begin("train")
    for step in range(100):
        clock[0] += 1.0
        shown.update(step, 100, loss=0.5)
    shown.end("done")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 + 100 // 30
    assert lines[1].startswith("train:  29.0 %")
    # 29 steps took 29 s, the first report being the start: 71 are left at the same pace.
    assert "1:11 left" in lines[1]


def test_what_a_resumed_task_finds_done_is_not_pace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    shown = progress.PlainReporter()
    shown.begin("train")
    shown.update(900, 1000)
    clock[0] = 50.0
    shown.update(950, 1000)
    assert "0:50 left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "shown"), [(0.12345, "0.1235"), (999, "999"), (1000, "1k"), (1_234_567, "1.23M"), (2e13, "20T")]
)
def test_numbers_for_people(value: float, shown: str) -> None:
    assert progress.human(value) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(5, "0:05"), (65, "1:05"), (7389, "2:03:09")])
def test_times_for_people(seconds: float, shown: str) -> None:
    assert progress.clock(seconds) == shown
