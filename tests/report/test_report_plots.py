"""Curves, axes and the rewriting of SVG."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes

from plmsae_cli.report.curves import envelope, tick_text, unit_of
from plmsae_cli.report.frontier import frontier
from plmsae_cli.report.models import representations
from plmsae_cli.report.svg import BLUE, MUTED, draw, stroke


def test_envelope_in_closed_form() -> None:
    lines = [{"tokens": 10 * i, "y": float(i)} for i in range(1, 101)]
    reduced = envelope(lines, "y", stretches=10)
    assert np.array_equal(reduced.x, np.arange(100, 1001, 100))
    assert np.array_equal(reduced.mean, np.arange(5.5, 100, 10))
    assert np.array_equal(reduced.low, np.arange(1, 101, 10))
    assert np.array_equal(reduced.high, np.arange(10, 101, 10))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.one_of(st.none(), st.floats()), max_size=700), st.integers(1, 300))
def test_envelope_keeps_extremes_and_stays_short(values: list[float | None], stretches: int) -> None:
    lines = [{"tokens": i, "y": value} for i, value in enumerate(values)]
    finite = [value for value in values if value is not None and np.isfinite(value)]
    reduced = envelope(lines, "y", stretches)
    assert len(reduced.x) <= stretches
    assert (len(reduced.x) > 0) == bool(finite)
    if finite:
        assert (reduced.low.min(), reduced.high.max()) == (min(finite), max(finite))


def test_lines_of_many_models_are_all_drawn_and_can_be_told_apart() -> None:
    assert len({tuple(map(str, stroke(index).values())) for index in range(20)}) == 20
    layers = [{"layer": layer, "valid": 0.1, "test": 0.1 * layer} for layer in range(3)]
    models = [
        {"model": f"model-{n}", "parameters": 8, "score": 0.2, "tasks": [{"score": 0.2, "layer": 2, "layers": layers}]}
        for n in range(7)
    ]
    split = {"train": 1, "valid": 1, "test": 1}
    task = {"task": "t", "of": "protein", "regression": True, "split": "cluster", "proteins": split}
    section = representations({"models": models, "tasks": [task]})
    assert all(f"model-{n}" in section.figures[0].svg for n in range(7))


def test_axes_speak_plainly() -> None:
    assert [unit_of(n) for n in (500, 3e6, 2e9)] == [("", 1.0), (" (millions)", 1e6), (" (billions)", 1e9)]
    assert [tick_text(v) for v in (0.05, 20, 1e-5, 2e7, 0)] == ["0.05", "20", "10⁻⁵", "2·10⁷", ""]


def test_frontier_in_closed_form() -> None:
    points = [(16, 0.30), (32, 0.20), (32, 0.25), (64, 0.20), (64, 0.15), (8, 0.50), (128, 0.15)]
    assert frontier(points) == [5, 0, 1, 4]
    assert frontier([]) == []
    assert frontier([(1, 1), (1, 1)]) == [0]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=30))
def test_frontier_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    front = {points[i] for i in frontier(points)}
    undominated = {
        p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)
    }  # fmt: skip
    assert front == undominated
    assert [points[i] for i in frontier(points)] == sorted(front)


def picture(name: str = "one", text: str = "label") -> str:
    def paint(axes: Axes) -> None:
        axes.plot([0, 1, 2], [0.123456, 1, 4], color=BLUE, marker="o")
        axes.set_xlabel(text)
        axes.annotate("here", (1, 1), color=MUTED)

    return str(draw(name, "A <label> & more", paint))


def test_svg_follows_the_page() -> None:
    svg = picture()
    assert svg.startswith("<svg ")
    assert 'aria-label="A &lt;label&gt; &amp; more"' in svg
    assert not re.search(r'style=|<style|<metadata|xmlns|xlink|font-family|="#[0-9a-f]{6}"', svg)
    assert 'class="s-blue"' in svg
    assert 'class="f-muted"' in svg
    paths = re.findall(r' d="([^"]*)"', svg)
    assert paths
    assert not [path for path in paths if re.search(r"\.\d{3}|\n", path)]


def test_svg_ids_are_prefixed_and_stable() -> None:
    assert picture() == picture()
    ids = {name: set(re.findall(r' id="([^"]+)"', picture(name))) for name in ("one", "two")}
    assert ids["one"]
    assert all(each.startswith("one-") for each in ids["one"])
    assert ids["one"].isdisjoint(ids["two"])


def test_svg_text_is_escaped_and_no_formula() -> None:
    svg = picture(text="<script>$\\frac{a}{0}$</script>")
    assert "&lt;script&gt;$\\frac{a}{0}$&lt;/script&gt;" in svg
    assert "<script" not in svg


def test_svg_refuses_a_colour_without_a_dark_form() -> None:
    with pytest.raises(KeyError):
        draw("bad", "bad", lambda axes: axes.plot([0, 1], color="#123456") and None)
