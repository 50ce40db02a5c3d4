"""The live table of the queue, drawn without a terminal: every experiment once, the stage at work with its share."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from plmsae_cli.cli.view import AROUND, QueueView
from plmsae_cli.executors.queue import Entry
from plmsae_cli.runtime.stop import STOP


def drawn(view: QueueView) -> list[str]:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    with console.capture() as shown:
        console.print(view.picture())
    return shown.get().splitlines()


def test_states_progress_and_figures() -> None:
    entries = [Entry(Path("a.yaml"), "done", 65.0), Entry(Path("b.yaml"), "running"), Entry(Path("c.yaml"))]
    said = io.StringIO()
    view = QueueView(entries, Console(file=said, width=100))
    view.begin("train")
    view.update(25.0, 100.0, unit="steps", fvu=0.1234567, note="half way")
    lines = drawn(view)
    assert lines[0].split() == ["experiment", "state", "stage", "progress", "time"]
    assert lines[1].split() == ["a", "done", "1:05"]
    assert lines[2].split()[:3] == ["b", "running", "train"]
    assert "25 %" in lines[2]
    assert "0:00 so far" in lines[2]
    assert lines[3].split() == ["c", "pending"]
    assert lines[4].split() == ["fvu", "0.1235"]
    view.end("0:13, runs/b")
    assert said.getvalue().splitlines() == ["half way", "train: 0:13, runs/b"]
    STOP.request()
    assert "press again to abort" in drawn(view)[-1]


def test_a_long_queue_fits_on_a_screen() -> None:
    entries = [Entry(Path(f"{i}.yaml"), "done" if i < 20 else "pending") for i in range(50)]
    entries[20].state = "running"
    lines = drawn(QueueView(entries, Console(file=io.StringIO())))
    assert len(lines) == 1 + 1 + 2 * AROUND + 1 + 1 + 1
    assert (lines[1].strip(), lines[-2].strip()) == ("(12 before)", "(21 behind)")
