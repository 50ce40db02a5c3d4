"""Trials as lines across their settings and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from plmsae_cli.report.svg import BLUE, MUTED, STONE, draw
from plmsae_cli.report.words import clean, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST = 9
"""Columns side by side that can still be read."""
_SPAN = 20.0
"""Positive numbers that span more than this factor are placed by their logarithm."""


def parallel(columns: Mapping[str, Sequence[Any]], marked: Collection[int]) -> Markup:
    """A vertical axis a column, a line a trial.

    Args:
        columns: name -> a value a trial: numbers go on a scale of their own, anything else on evenly spaced places.
        marked: trials drawn in colour, on top of the others.
    """
    names = [*columns][: _MOST - 2] + [*columns][-2:] if len(columns) > _MOST else [*columns]
    placed = {name: place(columns[name]) for name in names}
    num_trials = len(columns[names[0]])

    def paint(axes: Axes) -> None:
        for trial in sorted(range(num_trials), key=lambda index: index in marked):
            chosen = trial in marked
            axes.plot(
                range(len(names)), [placed[name][0][trial] for name in names], color=BLUE if chosen else STONE,
                linewidth=1.6 if chosen else 0.9, alpha=0.95 if chosen else 0.7, clip_on=False,
            )  # fmt: skip
        for index, name in enumerate(names):
            axes.axvline(index, color=MUTED, linewidth=0.7)
            for height, text in placed[name][1]:
                axes.annotate(
                    clean(text, 14), (index, height), (3, 2), textcoords="offset points", fontsize=7.5, color=MUTED
                )
        axes.set_xticks(range(len(names)), [clean(name, 16) for name in names])
        axes.tick_params(axis="x", length=0)
        axes.set_yticks([])
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.set_xlim(-0.1, len(names) - 0.6)
        axes.set_ylim(-0.04, 1.08)

    return draw("parallel", "Settings and figures of every trial, a line a trial", paint, size=(430, 210))


def place(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights in [0, 1], a value each, and the labels of the axis as (height, text)."""
    if all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        low, high = min(values), max(values)
        log = low > 0 and high / low > _SPAN
        start, end = (math.log(low), math.log(high)) if log else (float(low), float(high))
        width = (end - start) or 1.0
        heights = [((math.log(v) if log else v) - start) / width for v in values]
        distinct = sorted(set(values))
        told = distinct if len(distinct) <= 4 else [low, high]
        return heights, [(heights[values.index(v)], number(v)) for v in told]
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    kinds = list(dict.fromkeys(texts))
    where = {text: index / max(1, len(kinds) - 1) for index, text in enumerate(kinds)}
    return [where[text] for text in texts], [(height, text) for text, height in where.items()]
