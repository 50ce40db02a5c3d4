"""How far one fold of a protein lies from another: the same residues, by their CA atoms.

Residues that either side lacks (NaN) are left out. Distances are in angstrom.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Coordinates = npt.NDArray[np.float64]

INCLUSION = 15.0
"""Pairs closer than this in the reference count for lDDT."""
TOLERANCES = (0.5, 1.0, 2.0, 4.0)
FEWEST = 3
"""Residues of which something can be said."""
METRICS = ("rmsd", "mean_distance", "tm", "lddt")


def superpose(mobile_L3: Coordinates, fixed_L3: Coordinates) -> Coordinates:
    """`mobile` rotated and moved so that the summed squared distance to `fixed` is least (Kabsch 1976)."""
    mobile_mean, fixed_mean = mobile_L3.mean(0), fixed_L3.mean(0)
    left, _, right = np.linalg.svd((mobile_L3 - mobile_mean).T @ (fixed_L3 - fixed_mean))
    right[-1] *= np.sign(np.linalg.det(left @ right))  # a mirror image is another protein
    moved_L3: Coordinates = (mobile_L3 - mobile_mean) @ left @ right + fixed_mean
    return moved_L3


def rmsd(mobile_L3: Coordinates, fixed_L3: Coordinates) -> float:
    """Root of the mean squared distance after superposition."""
    return float(np.sqrt(np.square(superpose(mobile_L3, fixed_L3) - fixed_L3).sum(1).mean()))


def lddt(model_L3: Coordinates, reference_L3: Coordinates) -> float:
    """Share of the pairs within 15 in the reference whose distance is kept, the mean over tolerances of 0.5, 1, 2 and 4
    (Mariani et al. 2013); all pairs of residues together. NaN where no pair is so near."""
    first_P, second_P = np.triu_indices(len(reference_L3), 1)
    wanted_P = np.linalg.norm(reference_L3[first_P] - reference_L3[second_P], axis=1)
    near_P = wanted_P < INCLUSION
    if not near_P.any():
        return math.nan
    found_P = np.linalg.norm(model_L3[first_P[near_P]] - model_L3[second_P[near_P]], axis=1)
    off_P = np.abs(found_P - wanted_P[near_P])
    return float(np.mean([(off_P <= tolerance).mean() for tolerance in TOLERANCES]))


def tm_score(model_L3: Coordinates, reference_L3: Coordinates) -> float:
    """sum 1 / (1 + (d_i / d_0)^2) / L under the superposition that makes it largest (Zhang and Skolnick 2004), found by
    tmtools with each residue held to itself."""
    from tmtools import tm_align

    letters = "A" * len(reference_L3)
    found: Any = tm_align(model_L3, reference_L3, letters, letters, alignment=[letters, letters])
    return float(found.tm_norm_chain2)


def compare(model_L3: Coordinates, reference_L3: Coordinates) -> dict[str, float]:
    """`rmsd` (root of the mean squared distance after superposition), `mean_distance` (the mean of the distances under the
    same superposition, which some publications call RMSD), `tm` and `lddt` (0 to 1); NaN with fewer than 3 common residues."""
    both_L = np.isfinite(model_L3).all(1) & np.isfinite(reference_L3).all(1)
    model, reference = model_L3[both_L].astype(np.float64), reference_L3[both_L].astype(np.float64)
    if len(reference) < FEWEST:
        return dict.fromkeys(METRICS, math.nan)
    apart_L = np.linalg.norm(superpose(model, reference) - reference, axis=1)
    return {
        "rmsd": rmsd(model, reference),
        "mean_distance": float(apart_L.mean()),
        "tm": tm_score(model, reference),
        "lddt": lddt(model, reference),
    }
