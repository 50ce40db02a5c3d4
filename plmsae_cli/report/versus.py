"""Training curves of several runs side by side, by tokens and by the time that training took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from markupsafe import Markup

from plmsae_cli.report.curves import envelope, log_ticks, unit_of
from plmsae_cli.report.reading import Line, Run
from plmsae_cli.report.svg import draw, stroke
from plmsae_cli.report.words import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

By = Literal["tokens", "seconds"]
CURVES = {"fvu": "FVU", "loss": "loss", "l0": "active latents (L0)", "dead": "dead latents (share)"}
"""Field of metrics.jsonl -> its axis."""
_STOPS = (0.25, 0.5, 0.75, 1.0)


def timed(lines: Sequence[Line]) -> list[Line]:
    """The lines with `seconds`: what training had taken by then, from the mean time of a step between lines.

    Waiting between a stop and the next start is no part of it. The first line has no pace yet, and is taken at the second's.
    """
    found: list[Line] = []
    spent, before = 0.0, 0
    pace = next((line["step_ms"] for line in lines if line.get("step_ms")), None)
    for line in lines:
        pace = line.get("step_ms") or pace
        spent += (line["step"] - before) * (pace or 0.0) / 1e3
        before = line["step"]
        found.append({**line, "seconds": spent})
    return found


def trained(run: Run) -> list[Line]:
    """The training lines of a run, of whichever kind, with their times."""
    return timed(run.sae or run.plm)


def levels(runs: Mapping[str, Sequence[Line]], key: str, by: By) -> tuple[list[float], list[list[float | None]]]:
    """Curves at equal tokens, or equal time: at four stops up to the end of the shortest run.

    Returns:
        The stops, and for each a value a run: the mean of the stretch that ends there, or the newest before where no line
        is in it; None where a run has no such figure.
    """
    ends = [lines[-1][by] for lines in runs.values() if lines]
    if not ends or min(ends) <= 0:
        return [], []
    stops = [share * min(ends) for share in _STOPS]
    rows = []
    for start, stop in zip([0.0, *stops], stops, strict=False):
        row: list[float | None] = []
        for lines in runs.values():
            before = [line for line in lines if line[by] <= stop and line.get(key) is not None]
            values = [line[key] for line in before if line[by] > start] or [line[key] for line in before[-1:]]
            row.append(float(np.mean(values)) if values else None)
        rows.append(row)
    return stops, rows


def curves(runs: Mapping[str, Sequence[Line]], key: str, by: By) -> Markup | None:
    """One figure: a line a run, its mean over stretches. None where no run has the figure."""
    traces = {name: envelope(lines, key, x=by) for name, lines in runs.items()}
    traces = {name: trace for name, trace in traces.items() if trace.x.size}
    if not traces:
        return None
    furthest = max(trace.x[-1] for trace in traces.values())
    unit, divisor = unit_of(furthest) if by == "tokens" else _time_unit(furthest)

    def paint(axes: Axes) -> None:
        for index, (name, trace) in enumerate(traces.items()):
            axes.plot(trace.x / divisor, trace.mean, **stroke(index), label=clean(name, 28))
        values = np.concatenate([trace.mean for trace in traces.values()])
        if values.min() > 0 and values.max() / values.min() > 10:
            log_ticks(axes, "y")
        axes.set_xlim(left=0)
        axes.set_xlabel(f"training tokens{unit}" if by == "tokens" else f"time in training{unit}")
        axes.set_ylabel(CURVES[key])
        axes.grid(axis="y")
        axes.legend(loc="best", handlelength=2.0)

    return draw(f"{key}-{by}", f"{CURVES[key]} by {by}", paint)


def _time_unit(longest: float) -> tuple[str, float]:
    for size, name in ((3600.0, "hours"), (60.0, "minutes")):
        if longest >= 2 * size:
            return f" ({name})", size
    return " (seconds)", 1.0
