"""Looking into a training from outside: its FVU at each checkpoint, as it stands in metrics.jsonl."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plmsae_cli.config.training import Train
from plmsae_cli.runtime.metrics import metrics_line
from plmsae_cli.runtime.progress import Reporter

_TAIL = 20
"""The end of training is its last twentieth."""


class Pruned(Exception):
    """A trial was ended early: those before it were better at this step."""


class Watched:
    """A reporter that, whenever training has passed a checkpoint, tells its step and the mean FVU since the one before.

    Of a language model it is the loss: of a validation since then, else of training.
    """

    def __init__(self, inner: Reporter, run: Path, train: Train, tell: Callable[[int, float], None]) -> None:
        self._inner, self._tell, self._train = inner, tell, train
        self._path, self._read = run / "metrics.jsonl", 0
        self._lines: list[dict[str, Any]] = []
        self._told, self._pruned = 0, False

    def begin(self, title: str) -> None:
        self._inner.begin(title)

    def update(self, done: float | None, total: float | None, **figures: Any) -> None:
        self._inner.update(done, total, **figures)
        if done is not None and total is not None and done < total:  # at its end there is nothing left to save
            self.look()

    def end(self, text: str) -> None:
        self._inner.end("pruned" if self._pruned else text)

    def say(self, text: str) -> None:
        self._inner.say(text)

    def look(self, before: float = math.inf) -> None:
        """Tell of every checkpoint that training has passed since, but of none at step `before` or behind it."""
        every = self._train.checkpoint_every
        self._read_on()
        while self._told + every < before and self._lines and self._lines[-1]["step"] >= self._told + every:
            step = self._told + every
            since = [line for line in self._lines if self._told < line["step"] <= step]
            self._told = step
            if (value := level(since, self._train)) is not None:
                try:
                    self._tell(step, value)
                except Pruned:
                    self._pruned = True
                    raise

    def _read_on(self) -> None:
        """Take in the whole lines that were added.

        Looked at from another process, those that a killed start wrote after its checkpoint may be cut away in between.
        """
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._read:
                self._read, self._lines = 0, []
            file.seek(self._read)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        self._lines += [line for text in whole.splitlines() if (line := metrics_line(text)) is not None]


def level(lines: Sequence[Mapping[str, Any]], train: Train, key: str | None = None) -> float | None:
    """Mean of a figure over lines of metrics.jsonl, None where no line has it.

    Args:
        key: `fvu` or `loss`; by default the one that the kind of model has. The loss of a language model is that of its
            last validation, mean over sets, where there was one.
    """
    key = key or ("loss" if train.kind == "plm" else "fvu")
    scored = [line["valid"] for line in lines if "valid" in line]
    if key == "loss" and scored:
        losses = [float(each["loss"]) for each in scored[-1].values()]
        return sum(losses) / len(losses)
    values = [float(line[key]) for line in lines if line.get(key) is not None]
    return sum(values) / len(values) if values else None


def final(run: Path, train: Train, key: str) -> float | None:
    """The figure at the end of training."""
    rows = (run / "metrics.jsonl").read_bytes().splitlines()
    lines = [line for row in rows if (line := metrics_line(row)) is not None]
    last = lines[-1]["step"] if lines else 0
    return level([line for line in lines if line["step"] > last - max(1, last // _TAIL)], train, key)
