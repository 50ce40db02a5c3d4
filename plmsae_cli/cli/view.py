"""The queue on a terminal: a table of its experiments that moves, and above it what was said."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from plmsae_cli.executors.queue import Entry
from plmsae_cli.runtime.progress import Pace, clock, words

STYLES = {"running": "bold cyan", "done": "green", "skipped": "dim", "failed": "bold red", "interrupted": "yellow"}
AROUND = 8
"""Experiments shown before and after the one that runs; a long queue must fit on a screen."""


class QueueView:
    """A reporter that shows where every experiment of the queue stands."""

    def __init__(self, entries: Sequence[Entry], console: Console | None = None) -> None:
        self._entries = entries
        self._console = console or Console(stderr=True, highlight=False)
        self._stage, self._pace = "", Pace()
        self._at: tuple[float, float] | None = None
        self._figures: dict[str, Any] = {}
        self._begun: dict[int, float] = {}
        self._live = Live(console=self._console, refresh_per_second=4, transient=True, get_renderable=self.picture)

    def __enter__(self) -> QueueView:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def begin(self, title: str) -> None:
        self._stage, self._pace, self._at, self._figures = title, Pace(), None, {}

    def update(self, done: float | None, total: float | None, **figures: Any) -> None:
        if note := figures.get("note"):
            self.say(str(note))
        if done is not None and total is not None:
            self._pace.see(done)
            self._at, self._figures = (done, total), figures

    def end(self, text: str) -> None:
        self.say(f"{self._stage}: {text}")
        self._stage, self._at, self._figures = "", None, {}

    def say(self, text: str) -> None:
        self._console.print(Text(text))

    def picture(self) -> Group:
        """The table, and below it the figures of the stage at work."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("experiment", "state", "stage", "progress", "time"):
            table.add_column(name, no_wrap=True)
        now = next((i for i, e in enumerate(self._entries) if e.state in ("running", "pending")), len(self._entries))
        first, last = max(0, now - AROUND), now + AROUND + 1
        if first:
            table.add_row(Text(f"({first} before)", style="dim"))
        for number, entry in list(enumerate(self._entries))[first:last]:
            table.add_row(*self._row(number, entry))
        if last < len(self._entries):
            table.add_row(Text(f"({len(self._entries) - last} behind)", style="dim"))
        return Group(table, Text("  ".join(words(self._figures)), style="dim", overflow="ellipsis", no_wrap=True))

    def _row(self, number: int, entry: Entry) -> list[Any]:
        state = Text(entry.state, style=STYLES.get(entry.state, "dim"))
        if entry.state != "running":
            spent = clock(entry.seconds) if entry.seconds else ""
            return [Text(entry.path.stem), state, "", "", spent]
        spent = clock(time.monotonic() - self._begun.setdefault(number, time.monotonic()))
        if self._at is None:
            return [Text(entry.path.stem), state, Text(self._stage), "", spent]
        done, total = self._at
        share = done / max(total, 1e-9)
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=1.0, completed=share, width=20), f"{100 * share:.0f} %")
        return [Text(entry.path.stem), state, Text(self._stage), bar, f"{spent}, {self._pace.time(done, total)}"]
