"""How many of the strongest couplings are contacts, and how much of that survives the splice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
CUTS = {"L": 1, "L/2": 2, "L/5": 5}
SEPARATION = 24
"""Long range: at least so many residues apart (CASP)."""


def eligible(known_L: Bools) -> Bools:
    """[L, L]: pairs i < j, at least 24 apart, both resolved."""
    place_L = np.arange(len(known_L))
    far_LL = place_L[None] - place_L[:, None] >= SEPARATION
    return far_LL & known_L[:, None] & known_L[None]


def precision(score_LL: Floats, contact_LL: Bools, known_L: Bools) -> dict[str, float]:
    """P@L, P@L/2 and P@L/5 of long-range pairs, L the number of resolved residues.

    Of equal scores at the cut, the mean over all choices counts. Where fewer pairs exist, all count. NaN where there is none.
    """
    pairs_LL = eligible(known_L)
    score_P, contact_P = score_LL[pairs_LL], contact_LL[pairs_LL].astype(np.float64)
    if not len(score_P):
        return dict.fromkeys(CUTS, math.nan)
    ordered_P = np.sort(score_P)[::-1]
    found = {}
    for name, part in CUTS.items():
        number = min(max(1, int(known_L.sum()) // part), len(score_P))
        last = ordered_P[number - 1]
        above_P, equal_P = score_P > last, score_P == last
        rest = number - int(above_P.sum())
        found[name] = float((contact_P[above_P].sum() + rest * contact_P[equal_P].mean()) / number)
    return found


def recovered(original: float, sae: float, zero: float) -> float:
    """(P_sae - P_zero) / (P - P_zero); NaN where zero ablation costs nothing."""
    return (sae - zero) / (original - zero) if original != zero else math.nan


def summary(
    found: Sequence[Mapping[str, Mapping[str, float]]], bootstraps: int
) -> dict[str, dict[str, float | list[float]]]:
    """Means over proteins and what is recovered, by cut, with 95 % bootstrap intervals where there are several.

    Args:
        found: for each protein, by variant (`original`, `sae`, `zero`) and cut.

    Returns:
        cut -> `original`, `sae`, `zero`, `recovered`, and `interval_` of each; what is not finite is left out.
    """
    result: dict[str, dict[str, float | list[float]]] = {}
    draws_BP = np.random.default_rng(0).integers(len(found), size=(bootstraps, len(found)))
    for cut in CUTS:
        value_P = {name: np.array([one[name][cut] for one in found]) for name in ("original", "sae", "zero")}
        body: dict[str, float | list[float]] = {name: float(each.mean()) for name, each in value_P.items()}
        share = recovered(*(float(each.mean()) for each in value_P.values()))
        if math.isfinite(share):
            body["recovered"] = share
        if len(found) > 1:
            drawn = {name: each[draws_BP].mean(1) for name, each in value_P.items()}
            with np.errstate(divide="ignore", invalid="ignore"):
                drawn["recovered"] = (drawn["sae"] - drawn["zero"]) / (drawn["original"] - drawn["zero"])
            for name, each in drawn.items():
                with np.errstate(invalid="ignore"):  # between infinite shares of draws whose ablation costs nothing
                    ends = np.quantile(each, [0.025, 0.975]).tolist()
                if all(math.isfinite(end) for end in ends):
                    body[f"interval_{name}"] = ends
        result[cut] = body
    return result
