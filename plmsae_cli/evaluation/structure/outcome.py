"""Folds of all proteins as one table, and the means that people read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from plmsae_cli.evaluation.structure.metrics import METRICS

FIGURES = (*METRICS, "plddt", *(f"reference_{name}" for name in METRICS), "fvu", "l0")
"""Of a fold: distance to the original prediction, confidence, distance to the experimental structure, and what was spliced."""
KEYS = ("mode", "variant", "number")


def summary(rows: Sequence[Mapping[str, Any]], bootstraps: int) -> list[dict[str, Any]]:
    """A row for each way of folding, in the order of first sight: `proteins`, the mean of each figure over the proteins that
    have it, and `interval_<figure>`, 95 % over draws of proteins.

    A protein is its `place`: ids of two files may be the same. The same proteins are drawn for all ways, so that intervals
    can be compared.
    """
    order = list(dict.fromkeys(row["place"] for row in rows))
    at = {place: n for n, place in enumerate(order)}
    draws_BP = np.random.default_rng(0).integers(len(order), size=(bootstraps, len(order)))
    ways = dict.fromkeys(tuple(row[key] for key in KEYS) for row in rows)
    found = []
    for way in ways:
        mine = [row for row in rows if tuple(row[key] for key in KEYS) == way]
        body: dict[str, Any] = dict(zip(KEYS, way, strict=True)) | {"proteins": len(mine)}
        for figure in FIGURES:
            value_P = np.full(len(order), np.nan)
            for row in mine:
                if row[figure] is not None:
                    value_P[at[row["place"]]] = row[figure]
            known_P = np.isfinite(value_P)
            if not known_P.any():
                continue
            body[figure] = float(value_P[known_P].mean())
            if known_P.sum() > 1:
                body[f"interval_{figure}"] = _interval(value_P[draws_BP])
        found.append(body)
    return found


def _interval(drawn_BP: Any) -> list[float]:
    some_B = np.isfinite(drawn_BP).any(1)
    ends: list[float] = np.quantile(np.nanmean(drawn_BP[some_B], axis=1), [0.025, 0.975]).tolist()
    return ends


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """The same, None for what is not a number: JSON and Parquet have null."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
