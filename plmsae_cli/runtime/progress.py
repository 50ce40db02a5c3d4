"""Telling people how far it is: a live line on a terminal, a plain one every 30 s elsewhere. Always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

PLAIN_EVERY_S = 30.0


class Reporter(Protocol):
    """Shows stages and their progress."""

    def begin(self, title: str) -> None: ...
    def update(self, done: float | None, total: float | None, **figures: Any) -> None: ...
    def end(self, text: str) -> None: ...
    def say(self, text: str) -> None: ...


def human(value: float) -> str:
    """Three figures and a unit: 1234567 -> 1.23M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.4g}"


def clock(seconds: float) -> str:
    """1:05 or 2:03:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Pace:
    """Share done, and the time left at the pace so far."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self._first: tuple[float, float] | None = None

    def see(self, done: float) -> tuple[float, float]:
        """When the first report came, and what was done by then: what a resumed task finds done is not pace."""
        if self._first is None:
            self._first = (time.monotonic(), done)
        return self._first

    def left(self, done: float, total: float) -> float | None:
        """Seconds; None while there is no pace yet."""
        since, start = self.see(done)
        return (time.monotonic() - since) * (total - done) / (done - start) if done > start else None

    def time(self, done: float, total: float) -> str:
        left = self.left(done, total)
        return f"{clock(time.monotonic() - self.begun)} so far" if left is None else f"{clock(left)} left"

    def line(self, done: float, total: float, figures: dict[str, Any]) -> str:
        parts = [f"{100 * done / max(total, 1e-9):5.1f} %", self.time(done, total)]
        return "  ".join(parts + words(figures))


def words(figures: dict[str, Any]) -> list[str]:
    """Each figure with its name."""
    return [f"{k} {_shown(v)}" for k, v in figures.items() if k not in ("unit", "note")]


def _shown(value: Any) -> str:
    return human(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


class PlainReporter:
    """A line now and then, for logs."""

    def __init__(self) -> None:
        self._title, self._pace, self._last = "", Pace(), 0.0

    def begin(self, title: str) -> None:
        self._title, self._pace, self._last = title, Pace(), time.monotonic()
        self.say(f"{title} ...")

    def update(self, done: float | None, total: float | None, **figures: Any) -> None:
        if note := figures.get("note"):
            self.say(str(note))
        if done is None or total is None:
            return
        self._pace.see(done)
        if time.monotonic() - self._last < PLAIN_EVERY_S:
            return
        self._last = time.monotonic()
        self.say(f"{self._title}: {self._pace.line(done, total, figures)}")

    def end(self, text: str) -> None:
        self.say(f"{self._title}: {text}")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class LiveReporter:
    """One line that moves, by rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        self._console = Console(stderr=True, highlight=False)
        self._text: Callable[[str], Text] = Text
        self._live: Live | None = None
        self._make: Callable[[], Live] = lambda: Live(console=self._console, refresh_per_second=8, transient=True)
        self._title, self._pace = "", Pace()

    def begin(self, title: str) -> None:
        self._title, self._pace = title, Pace()
        self._live = self._make()
        self._live.start()
        self._live.update(self._text(f"{title} ..."))

    def update(self, done: float | None, total: float | None, **figures: Any) -> None:
        if note := figures.get("note"):
            self.say(str(note))
        if done is not None and total is not None and self._live is not None:
            self._live.update(self._text(f"{self._title}  {self._pace.line(done, total, figures)}"))

    def end(self, text: str) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._console.print(self._text(f"{self._title}: {text}"))

    def say(self, text: str) -> None:
        self._console.print(self._text(text))


def reporter(live: bool) -> Reporter:
    """A live line where stderr is a terminal and nobody objected, else plain lines."""
    return LiveReporter() if live and sys.stderr.isatty() else PlainReporter()
