"""Standard streams that outlive their readers."""

from __future__ import annotations

import io
import os
import sys


class Steady(io.TextIOWrapper):
    """A stream that goes on into nothing once its reader has gone.

    `| head` leaves when it has seen enough, and Ctrl-C ends the `tee` of `| tee` too: neither may fail a run that is saving.
    """

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._leave()
            super().flush()

    def _leave(self) -> None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.fileno())
        os.close(nothing)


def steady_streams() -> None:
    """Make stdout and stderr of this process steady."""
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        if isinstance(old, io.TextIOWrapper) and not old.isatty():
            file = io.BufferedWriter(io.FileIO(old.fileno(), "w", closefd=False))
            steady = Steady(file, old.encoding, old.errors, line_buffering=name == "stderr", write_through=False)
            setattr(sys, name, steady)
