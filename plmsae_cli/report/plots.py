"""The pictures of a run's page. Each returns one inline SVG, or None where there is nothing to show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from plmsae_cli.report.curves import envelope, log_ticks, unit_of
from plmsae_cli.report.reading import Latents, Line
from plmsae_cli.report.svg import BLUE, GREEN, INK, MUTED, ORANGE, SERIES, STONE, WASH, draw, stroke
from plmsae_cli.report.words import clean, number, power

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INTERESTING = (1e-4, 1e-2)
"""Densities between which a latent is rare enough to be specific and common enough to be checked."""


def curve(
    name: str,
    label: str,
    lines: Sequence[Line],
    keys: Mapping[str, str],
    *,
    scale: float = 1.0,
    reference: tuple[float, str] | None = None,
    log: bool = True,
    from_zero: bool = True,
) -> Markup | None:
    """Training curves over tokens: the mean of each stretch as a line, its extremes as a band.

    Args:
        keys: field of metrics.jsonl -> its name in the legend; one entry needs no legend.
        scale: factor on the values, 100 for a percentage.
        reference: a value to compare with, and its name, drawn as a dashed line.
        log: allow a logarithmic axis where the values span more than a decade.
        from_zero: begin a linear axis at zero.
    """
    traces = {key: envelope(lines, key) for key in keys}
    traces = {key: trace for key, trace in traces.items() if trace.x.size}
    if not traces:
        return None
    unit, divisor = unit_of(max(trace.x[-1] for trace in traces.values()))

    def paint(axes: Axes) -> None:
        smallest, largest = math.inf, -math.inf
        for (key, trace), colour in zip(traces.items(), SERIES, strict=False):
            x = trace.x / divisor
            axes.fill_between(x, trace.low * scale, trace.high * scale, color=colour, alpha=0.18, linewidth=0)
            marker = "o" if x.size == 1 else None
            axes.plot(x, trace.mean * scale, color=colour, label=keys[key], marker=marker, markersize=4)
            smallest, largest = min(smallest, trace.low.min() * scale), max(largest, trace.high.max() * scale)
        if reference is not None:
            value, text = reference[0] * scale, reference[1]
            axes.axhline(value, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.annotate(
                text, (1, value), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", va="bottom", fontsize=8.5,
            )  # fmt: skip
            smallest, largest = min(smallest, value), max(largest, value)
        if log and smallest > 0 and largest / smallest > 10:
            log_ticks(axes, "y")
        elif from_zero and smallest >= 0:
            axes.set_ylim(0, largest * 1.08 or 1)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"training tokens{unit}")
        axes.set_ylabel(label)
        axes.grid(axis="y")
        if len(traces) > 1:
            axes.legend(loc="upper right", borderaxespad=0.2, handlelength=1.4)

    return draw(name, f"{label} during training", paint)


def validation(name: str, label: str, lines: Sequence[Line], key: str) -> Markup | None:
    """A protein language model's score on each validation set over steps."""
    sets = list(dict.fromkeys(each for line in lines for each in line["valid"]))
    points = {
        each: [(line["step"], line["valid"][each][key]) for line in lines if each in line["valid"]] for each in sets
    }
    if not sets:
        return None

    def paint(axes: Axes) -> None:
        for index, (each, values) in enumerate(points.items()):
            axes.plot(*zip(*values, strict=True), **stroke(index), label=clean(each, 24), marker="o", markersize=2.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("training steps")
        axes.set_ylabel(label)
        axes.grid(axis="y")
        axes.legend(loc="best", handlelength=1.4)

    return draw(name, f"{label} during training", paint)


def density(latents: Latents, rows: int | None) -> Markup:
    """Histogram of log10 density, with the latents that never fired as a bar of their own at the left."""
    fires = latents.density > 0
    logs = np.log10(latents.density[fires])
    silent = int((~fires).sum())
    low = math.floor(min(float(logs.min()), -math.log10(rows) if rows else 0.0)) if logs.size else -5
    edges = np.arange(low, 0.2, 0.2)

    def paint(axes: Axes) -> None:
        axes.axvspan(*(math.log10(edge) for edge in INTERESTING), color=WASH, linewidth=0)
        counts, _, _ = axes.hist(logs, bins=edges.tolist(), color=BLUE, rwidth=0.9)
        ticks: list[float] = [*range(low, 1)]
        names = [power(tick) if tick else "1" for tick in range(low, 1)]
        if silent:
            axes.bar(low - 0.6, silent, width=0.5, color=ORANGE)
            ticks, names = [low - 0.6, *ticks], ["never", *names]
        axes.set_xticks(ticks, names)
        axes.set_xlim(low - (1.1 if silent else 0.1), 0.1)
        axes.set_ylim(0, 1.08 * max(float(np.max(counts, initial=0.0)), silent, 1))
        axes.locator_params(axis="y", integer=True)
        axes.set_xlabel("density (share of held-out residues)")
        axes.set_ylabel("latents")
        axes.grid(axis="y")

    return draw("density", "Histogram of the latents' densities", paint)


def active(deciles: Sequence[float], mean: float) -> Markup | None:
    """L0 by share of residues; None where every residue has the same number of active latents."""
    if len(deciles) < 2 or min(deciles) == max(deciles):
        return None

    def paint(axes: Axes) -> None:
        shares = np.linspace(0, 100, len(deciles))
        axes.axhline(mean, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(f"mean {number(mean)}", (0, mean), (3, 3), textcoords="offset points", fontsize=8.5)
        axes.plot(shares, deciles, color=BLUE, marker="o", markersize=4, clip_on=False, zorder=3)
        axes.set_xlim(0, 100)
        if min(deciles) > 0 and max(deciles) / min(deciles) > 10:
            log_ticks(axes, "y")
        else:
            axes.set_ylim(0, 1.08 * max(deciles))
        axes.set_xlabel("share of residues with at most so many (%)")
        axes.set_ylabel("active latents (L0)")
        axes.grid(axis="y")

    return draw("active", "Distribution of the number of active latents a residue", paint)


def bars(
    name: str,
    label: str,
    unit: str,
    values: Mapping[str, float],
    text: Callable[[float], str],
    *,
    colours: Mapping[str, str] | None = None,
) -> Markup | None:
    """Horizontal bars from zero, each with its number at its end, the first on top."""
    finite = {key: value for key, value in values.items() if math.isfinite(value)}
    if not finite:
        return None

    def paint(axes: Axes) -> None:
        places = range(len(finite))
        fills = [(colours or {}).get(key, BLUE) for key in finite]
        axes.barh(places, list(finite.values()), height=0.62, color=fills)
        for place, value in zip(places, finite.values(), strict=True):
            axes.annotate(text(value), (max(value, 0.0), place), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(places, [clean(key, 32) for key in finite])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(finite) - 0.4, -0.6)  # the first on top
        # Room for the numbers, which stand outside their bars.
        axes.set_xlim(min(0.0, *finite.values()), 1.28 * (max(*finite.values(), 0.0) or 1.0))
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(unit)
        axes.grid(axis="x")

    return draw(name, label, paint, size=(300, 50 + 24 * len(finite)))


def unexplained(fidelity: Mapping[str, Any], training: float | None) -> Markup | None:
    """The FVU beside its parts: the typical residue, the direction alone, the last training steps."""
    parts = {"all residues": fidelity.get("fvu"), "median residue": fidelity.get("fvu_median_token")}
    cosine = fidelity.get("cosine")
    parts["1 − cosine"] = None if cosine is None else 1 - cosine
    parts["end of training"] = training
    values = {key: value for key, value in parts.items() if value is not None}
    colours = {"all residues": BLUE, "1 − cosine": STONE, "end of training": STONE, "median residue": STONE}
    return bars(
        "unexplained",
        "Unexplained variance",
        "FVU, and 1 − cosine (0 is perfect)",
        values,
        number,
        colours=colours,
    )


def losses(loss: Mapping[str, Any]) -> Markup | None:
    """Cross-entropy of the language model: as it is, through the dictionary, and with the layer ablated."""
    names = {"ce": "original", "ce_sae": "dictionary", "ce_mean": "mean ablation", "ce_zero": "zero ablation"}
    values = {text: loss[key] for key, text in names.items() if loss.get(key) is not None}
    colours = {"original": GREEN, "dictionary": BLUE, "mean ablation": STONE, "zero ablation": STONE}
    label = "cross-entropy at masked residues (nats)"
    return bars("losses", label, label, values, lambda value: number(value, 4), colours=colours)


def pareto(groups: Mapping[str, Sequence[tuple[float, float, str]]], front: Sequence[tuple[float, float]]) -> Markup:
    """FVU against L0, a point a trial, the frontier as a staircase.

    Args:
        groups: name of a group -> its trials as (L0, FVU, text shown if the trial is on the frontier).
        front: the frontier's (L0, FVU), by increasing L0.
    """
    points = [point for group in groups.values() for point in group]
    largest, smallest = max(p[0] for p in points), min(p[0] for p in points)
    on_front = set(front)

    def paint(axes: Axes) -> None:
        xs, ys = zip(*front, strict=True)
        axes.step(xs, ys, where="post", color=INK, linewidth=0.9, label="frontier")
        styles = zip(SERIES * (1 + len(groups) // len(SERIES)), "osD^v" * (1 + len(groups) // 5), strict=False)
        for (name, group), (colour, marker) in zip(groups.items(), styles, strict=False):
            x, y = [p[0] for p in group], [p[1] for p in group]
            axes.plot(
                x,
                y,
                linestyle="",
                marker=marker,
                markersize=5,
                color=colour,
                label=clean(name, 40) or "trials",
            )
        for x_one, y_one, text in points:
            if (x_one, y_one) in on_front and text:
                axes.annotate(
                    clean(text, 24),
                    (x_one, y_one),
                    (5, 5),
                    textcoords="offset points",
                    fontsize=8,
                    color=MUTED,
                )
        if smallest > 0 and largest / smallest > 4:
            log_ticks(axes, "x", margin=1.25)
        else:
            axes.margins(x=0.12)
        axes.set_ylim(0, 1.15 * max(p[1] for p in points))
        axes.set_xlabel("active latents a residue (L0, mean)")
        axes.set_ylabel("unexplained variance (FVU)")
        axes.grid()
        axes.legend(loc="best", handlelength=1.2)

    return draw("pareto", "FVU against L0 of every trial, with the Pareto frontier", paint, size=(330, 225))


def stage_times(times: Mapping[str, float], text: Callable[[float], str]) -> Markup | None:
    """How long each stage took."""
    longest = max(times.values(), default=0.0)
    unit, divisor = ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 120 else ("seconds", 1.0)
    values = {stage: value / divisor for stage, value in times.items()}
    return bars("times", "Time of each stage", unit, values, lambda value: text(value * divisor))
