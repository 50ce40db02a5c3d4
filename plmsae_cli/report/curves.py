"""Long curves made short, and axes made legible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from plmsae_cli.report.reading import Line
from plmsae_cli.report.words import power

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_STRETCHES = 240
"""Points of a curve: about one for each pixel of its plot, whatever the length of the run."""


@dataclass(frozen=True)
class Envelope:
    """A curve in stretches: for each its place, mean, least and largest value (equal-length arrays)."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def envelope(lines: Sequence[Line], key: str, stretches: int = _STRETCHES, x: str = "tokens") -> Envelope:
    """Reduce `key` over `x` to at most `stretches` points; leaves out what is absent or not finite."""
    pairs = [(line[x], line[key]) for line in lines if line.get(key) is not None]
    finite = np.array([pair for pair in pairs if math.isfinite(pair[1])], dtype=np.float64).reshape(-1, 2)
    # Stretches of one length: unequal ones would change how smooth the curve looks along the way.
    length = -(-len(finite) // stretches) or 1
    parts = [finite[start : start + length] for start in range(0, len(finite), length)]
    return Envelope(
        x=np.array([part[-1, 0] for part in parts]),
        mean=np.array([part[:, 1].mean() for part in parts]),
        low=np.array([part[:, 1].min() for part in parts]),
        high=np.array([part[:, 1].max() for part in parts]),
    )


def unit_of(largest: float) -> tuple[str, float]:
    """What to divide counts up to `largest` by, and how the axis says so: 3e6 -> (" (millions)", 1e6)."""
    for size, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if largest >= 2 * size:
            return f" ({name})", size
    return "", 1.0


def tick_text(value: float, _: object = None) -> str:
    """A tick of a logarithmic axis: plain where short, a power of ten beyond."""
    if value <= 0:
        return ""
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    lead = round(value / 10.0**exponent)
    return power(exponent) if lead == 1 else f"{lead}·{power(exponent)}"


def log_ticks(axes: Axes, which: Literal["x", "y"], margin: float = 1.0) -> None:
    """Make an axis logarithmic with ticks at 1, 2, 5 where it spans little, at powers of ten where much."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis: Axis
    if which == "x":
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xlim(low / margin, high * margin)
        axis = axes.xaxis
    else:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axis = axes.yaxis
    steps = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(tick_text))
    axis.set_minor_formatter(NullFormatter())
