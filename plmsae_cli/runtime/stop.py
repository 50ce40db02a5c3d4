"""Stopping: the first Ctrl-C, SIGTERM or a STOP file asks; the second insists.

`request` may be called from a signal handler. Loops call `requested()` between steps; it costs one attribute read, plus
a stat of the STOP file at most every second.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

FORCED = 130


class Stop:
    """A process's wish to stop."""

    def __init__(self) -> None:
        self.asked = False
        self._files: list[Path] = []
        self._looked = 0.0
        self._last_acts: list[Callable[[], None]] = []

    @contextmanager
    def watching(self, file: Path) -> Iterator[None]:
        """Within, also stop when this file appears, which works under any launcher; files that are watched already stay so."""
        self._files.append(file)
        try:
            yield
        finally:
            self._files.remove(file)

    def request(self) -> None:
        self.asked = True

    def requested(self) -> bool:
        if not self.asked and self._files and time.monotonic() - self._looked > 1.0:
            self._looked = time.monotonic()
            self.asked = any(file.exists() for file in list(self._files))
        return self.asked

    def listen(self, *numbers: signal.Signals) -> None:
        """Take these signals for a wish, however often they come: a cluster that insists sends SIGKILL."""
        for number in numbers:
            signal.signal(number, lambda *_: self.request())

    @contextmanager
    def before_forced_exit(self, act: Callable[[], None]) -> Iterator[None]:
        """Within, `act` is the last thing done if a second signal ends the process at once."""
        self._last_acts.append(act)
        try:
            yield
        finally:
            self._last_acts.remove(act)

    @contextmanager
    def keeping_handlers(self) -> Iterator[None]:
        """Within, a library may take signals for itself; behind it they are handled as before."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():  # in others nobody can set one
                for number, handler in before.items():
                    signal.signal(number, handler)

    def install(self, quiet: bool = False) -> None:
        """Handle SIGINT and SIGTERM in this process: ask first, leave at once on the second."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self.asked:
                for act in reversed(self._last_acts):
                    with suppress(Exception):
                        act()
                os._exit(FORCED)
            self.asked = True
            if not quiet:
                # Only async-signal-safe work here: one write, no locks.
                with suppress(OSError):  # the same Ctrl-C has ended a `| tee`
                    os.write(sys.stderr.fileno(), b"\nstopping at the next safe point, press again to abort\n")

        signal.signal(signal.SIGINT, handle)
        signal.signal(signal.SIGTERM, handle)


STOP = Stop()
