"""Layers of the experiment's model -> layers of the bundled one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any


def _bundled_layers() -> int:
    config = files("plmsae_cli") / "data" / "bundled" / "config.json"
    return int(json.loads(config.read_text(encoding="utf-8"))["config"]["num_layers"])


BUNDLED_LAYERS = _bundled_layers()


def layer_map(data: Mapping[str, Any]) -> dict[int, int]:
    """Every layer the experiment names -> a layer of the bundled model, in the same order."""
    named = list(data["embed"]["layers"]) if data["embed"] is not None else []
    if data["train"] is not None and data["train"]["layer"] is not None:
        named.append(data["train"]["layer"])
    return spread([*named, *swept_layers(data)], BUNDLED_LAYERS)


def swept_layers(data: Mapping[str, Any]) -> list[int]:
    grid = listed(data["sweep"]) if data["sweep"] is not None else {}
    lists = [grid.get("train.layer", []), *grid.get("embed.layers", [])]
    return [layer for values in lists for layer in values if layer is not None]


def spread(numbers: Iterable[int], most: int) -> dict[int, int]:
    """Numbers from 0 -> numbers up to `most`, in order, distinct while there is room; kept if they fit."""
    ordered = sorted(set(numbers))
    if not ordered or ordered[-1] <= most:
        return {number: number for number in ordered}
    if len(ordered) > most + 1:
        return {number: rank * most // (len(ordered) - 1) for rank, number in enumerate(ordered)}
    result: dict[int, int] = {}
    lowest = 0
    for rank, number in enumerate(ordered):
        highest = most - (len(ordered) - 1 - rank)
        result[number] = min(max(round(number * most / ordered[-1]), lowest), highest)
        lowest = result[number] + 1
    return result


def listed(sweep: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values of each swept field; of a range its ends."""
    search = sweep["random"] or sweep["optuna"]
    axes = sweep["grid"] if search is None else search["space"]
    return {path: each if isinstance(each, list) else [each["low"], each["high"]] for path, each in axes.items()}
