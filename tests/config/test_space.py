"""Spaces of a search: what is drawn, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.space import Range, axes, axis, corners, draw, num_points
from plmsae_cli.config.yaml import InvalidExperiment, load

SPACE: dict[str, Any] = {
    "train.lr": {"low": 1e-5, "high": 1e-2, "log": True},
    "train.sae.k": [16, 32, 64],
    "train.seed": {"low": 3, "high": 7},
    "train.lr_decay": {"low": 0.25, "high": 0.75},
}
BASE = "embed: {fasta: a.fasta, layers: [2]}\nshuffle: {}\noptimize: {}\ntrain: {sae: {num_latents: 100}}\n"


def test_draws_cover_the_space_evenly_and_repeat() -> None:
    points = draw(SPACE, 600, 0)
    assert points == draw(SPACE, 600, 0)
    assert points[:100] == draw(SPACE, 100, 0), "more trials keep the first"
    assert points[:50] == draw(dict(reversed(SPACE.items())), 50, 0), "the order of fields is of no account"
    assert points[:50] != draw(SPACE, 50, 1)
    # Counts of equally likely values: 600 / n, within four standard deviations.
    for path, values in (("train.sae.k", [16, 32, 64]), ("train.seed", [3, 4, 5, 6, 7])):
        for value in values:
            share = 1 / len(values)
            count = sum(point[path] == value for point in points)
            assert abs(count - 600 * share) < 4 * math.sqrt(600 * share * (1 - share)), (path, value)
    # The logarithm of a log range is uniform over [-5, -2]: mean -3.5, standard deviation 3 / sqrt(12).
    logs = [math.log10(point["train.lr"]) for point in points]
    assert abs(sum(logs) / 600 + 3.5) < 4 * 3 / math.sqrt(12 * 600)
    assert all(-5 <= value <= -2 for value in logs)
    assert abs(sum(point["train.lr_decay"] for point in points) / 600 - 0.5) < 4 * 0.5 / math.sqrt(12 * 600)
    assert all(isinstance(point["train.seed"], int) for point in points)


@settings(deadline=None, max_examples=50)
@given(st.integers(-50, 50), st.integers(1, 60), st.floats(0, 1, exclude_max=True))
def test_a_whole_range_gives_whole_numbers_within(low: int, width: int, share: float) -> None:
    each = Range(low, low + width, log=False, whole=True)
    value = each.at(share)
    assert isinstance(value, int)
    assert low <= value <= low + width


def test_points_and_corners_are_counted() -> None:
    assert num_points(axes({"train.sae.k": [1, 2], "train.seed": {"low": 0, "high": 4}})) == 10
    assert num_points(axes(SPACE)) is None
    found = list(corners(SPACE))
    assert len(found) == 1 + 1 + 2 + 1 + 1
    assert {point["train.lr"] for point in found} == {1e-5, 1e-2}
    assert {point["train.seed"] for point in found} == {3, 7}
    assert {point["train.sae.k"] for point in found} == {16, 32, 64}
    with pytest.raises(UserError, match="only 2 points"):
        draw({"train.sae.k": [1, 2]}, 3, 0)


@pytest.mark.parametrize(("value", "message"), [
    ([], "must not be empty"),
    ([1, 1], "1 is listed twice"),
    (5, "must be values or a range"),
    ({"low": 1}, "high must be a number"),
    ({"low": 1, "high": 2, "step": 1}, "a range has no step"),
    ({"low": 2, "high": 1}, r"low \(2\) must be below high \(1\)"),
    ({"low": 0, "high": 1, "log": True}, "log: true needs low above 0"),
    ({"low": 0.5, "high": 4}, "takes whole numbers"),
])  # fmt: skip
def test_an_axis_that_is_none(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        axis("train.sae.k", value)


@pytest.mark.parametrize(("sweep", "place", "hint"), [
    ("random: {space: {train.lrr: [1]}}", "sweep.random.space.train.lrr: unknown path", "did you mean train.lr?"),
    ("optuna: {space: {trian.sae.k: [1]}}", "sweep.optuna.space.trian.sae.k: unknown path", "did you mean train.sae.k?"),
    ("random: {trials: 2, space: {train.sae.k: [4, 400]}}", "space.train.sae.k[1]: k (400) is larger", "lower k"),
    ("optuna: {trials: 2, space: {train.sae.k: {low: 4, high: 400}}}", "k (400) is larger than num_latents", "lower k"),
    ("random: {trials: 9, space: {train.sae.k: [4, 8]}}", "asks for 9 trials of a space of 2 points", "lower trials to 2"),
    ("grid: {train.seed: [0]}\n  optuna: {space: {train.seed: [0]}}", "grid and optuna both say", "keep one of them"),
    ("stream: shared\n  optuna: {space: {train.lr: {low: 1, high: 2}}}", "chooses each trial after those before", "random"),
    ("stream: each", "a sweep needs grid, random or optuna", "add `grid:"),
    ("optuna: {metric: cosine, space: {train.seed: [0, 1]}, trials: 2}", "there is no eval section", "add `eval: {}`"),
    ("random: {trials: 1001, space: {train.lr: {low: 1, high: 2}}}", "makes 1,001 trials", "lower trials"),
    ("random: {space: {train.sae.architecture: {low: 1, high: 2}}}", "takes no numbers", "list its values"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_anything_runs(sweep: str, place: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "exp.yaml"
    path.write_text(f"{BASE}sweep:\n  {sweep}\n")
    with pytest.raises(InvalidExperiment) as caught:
        load(path)
    assert place in str(caught.value)
    assert hint in str(caught.value)
