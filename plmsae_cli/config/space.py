"""What a search draws from: values to choose from, ranges to draw between, and the points of a random search."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.tree import entries, options, plain

_DRAWS = 100
"""Draws for a trial before a space counts as exhausted."""


@dataclass(frozen=True)
class Range:
    """Numbers between two, evenly or by their logarithm; whole ones where the field takes no others."""

    low: float
    high: float
    log: bool
    whole: bool

    def at(self, share: float) -> float | int:
        """The number at a share in [0, 1) of the range, to three figures."""
        if self.whole:
            # Each whole number owns the half unit on either side, so that the ends are as likely as the rest.
            low, high = self.low - 0.5, self.high + 0.5
            return min(int(self.high), max(int(self.low), round(_between(low, high, share, self.log))))
        return min(self.high, max(self.low, float(f"{_between(self.low, self.high, share, self.log):.3g}")))


Axis = list[Any] | Range


def axis(path: str, value: Any) -> Axis:
    """One field's values or range, as written under `space`.

    Raises:
        UserError: it is neither; the message is without the field's name.
    """
    if isinstance(value, list):
        if not value:
            raise UserError("must not be empty", "list values, or give `{low: ..., high: ...}`")
        for index, item in enumerate(value):
            if item in value[:index]:
                raise UserError(f"{plain(item)} is listed twice", "list each value once")
        return value
    form = "a list such as [16, 32], or {low: 1e-5, high: 1e-3, log: true}"
    if not isinstance(value, dict):
        raise UserError("must be values or a range", form)
    if strange := sorted(value.keys() - {"low", "high", "log"}):
        raise UserError(f"a range has no {', '.join(strange)}", form)
    low, high, log = value.get("low"), value.get("high"), value.get("log", False)
    for name, number in (("low", low), ("high", high)):
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise UserError(f"{name} must be a number", form)
    assert low is not None
    assert high is not None
    if not isinstance(log, bool):
        raise UserError("log must be true or false", form)
    if low >= high:
        raise UserError(f"low ({plain(low)}) must be below high ({plain(high)})", "exchange them, or list the value")
    if log and low <= 0:
        raise UserError(f"log: true needs low above 0, found {plain(low)}", "raise low, or remove log")
    kinds = _kinds(path)
    if not kinds & {int, float}:
        raise UserError("takes no numbers, so it has no range", "list its values")
    whole = float not in kinds
    if whole and not (float(low).is_integer() and float(high).is_integer()):
        raise UserError("takes whole numbers", "make low and high whole")
    return Range(low, high, log, whole)


def _kinds(path: str) -> set[Any]:
    entry = entries().get(path)
    return set() if entry is None else {kind for kind, _ in options(entry.annotation, entry.metadata)}


def axes(space: Mapping[str, Any]) -> dict[str, Axis]:
    """Every field's values or range. Raises UserError as `axis` does."""
    return {path: axis(path, value) for path, value in space.items()}


def num_points(space: Mapping[str, Axis]) -> int | None:
    """How many points there are; None where a range makes them countless."""
    sizes = [
        len(each) if isinstance(each, list) else int(each.high - each.low) + 1 if each.whole else None
        for each in space.values()
    ]
    return None if None in sizes else math.prod(size for size in sizes if size is not None)


def draw(space: Mapping[str, Any], trials: int, seed: int) -> list[dict[str, Any]]:
    """The points of a random search, each another.

    A value is a function of the seed, the draw's number and the field alone, so that more trials, or another order of the
    fields, keep the points there are.

    Raises:
        UserError: the space has fewer points.
    """
    read = axes(space)
    found: dict[str, dict[str, Any]] = {}
    for number in range(_DRAWS * trials):
        point = {path: _value(each, _share(seed, number, path)) for path, each in read.items()}
        found.setdefault(json.dumps(point, sort_keys=True), point)
        if len(found) == trials:
            return list(found.values())
    raise UserError(f"only {len(found)} points were found for {trials} trials", "lower trials, or widen the space")


def corners(space: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Points that have every listed value and both ends of every range, the other fields at their first."""
    ends = {path: each if isinstance(each, list) else [each.at(0), each.at(1)] for path, each in axes(space).items()}
    first = {path: values[0] for path, values in ends.items()}
    yield first
    for path, values in ends.items():
        for value in values[1:]:
            yield {**first, path: value}


def _value(each: Axis, share: float) -> Any:
    return each[int(share * len(each))] if isinstance(each, list) else each.at(share)


def _share(seed: int, number: int, path: str) -> float:
    """A number in [0, 1) that looks random."""
    text = f"{seed}/{number}/{path}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big") / 2**48


def _between(low: float, high: float, share: float, log: bool) -> float:
    return low * (high / low) ** share if log else low + (high - low) * share
