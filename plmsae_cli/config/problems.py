"""What is wrong with an experiment file: each problem with its place, its line and the way to mend it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plmsae_cli.config.errors import UserError

OVERRIDE = "--set"
_SHOWN = 100  # characters of a line that are printed; longer ones are cut around the caret


@dataclass(frozen=True)
class Problem:
    """One mistake. `line` and `column` count from 1; line 0: no line is to blame (`--set`, no file)."""

    line: int
    column: int
    path: str
    message: str
    hint: str | None = None
    source: str = ""
    snippet: str = ""

    def __str__(self) -> str:
        place = f"{self.source}:{self.line}:{self.column}" if self.line else self.source
        if self.source == OVERRIDE and self.path:
            head = f"{OVERRIDE} {self.path}: {self.message}"
        else:
            head = ": ".join(filter(None, (place, self.path, self.message)))
        parts = [head]
        if self.snippet.strip():
            line, column = _window(self.snippet, self.column - 1)
            parts += [f"  {line}", f"  {' ' * column}^"]
        if self.hint is not None:
            parts.append(f"hint: {self.hint}")
        return "\n".join(parts)


class InvalidExperiment(UserError):
    """All the problems of one experiment file, those with a line first, by line."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: (p.line == 0, p.line, p.column)))
        super().__init__("\n\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[InvalidExperiment], tuple[Sequence[Problem]]]:  # type: ignore[override]
        return type(self), (self.problems,)


def dotted(path: Sequence[str | int]) -> str:
    """`("embed", "layers", 1)` as `embed.layers[1]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def printable(line: str) -> str:
    """A line for the terminal: one column a character, no control characters."""
    return "".join(c if c.isprintable() else " " if c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in line)


def _window(line: str, column: int) -> tuple[str, int]:
    if len(line) <= _SHOWN:
        return line, column
    start = max(0, min(column - _SHOWN // 2, len(line) - _SHOWN))
    left, right = ("..." if start else ""), ("..." if start + _SHOWN < len(line) else "")
    return left + line[start : start + _SHOWN] + right, column - start + len(left)
