"""Effects over proteins: sizes, paired tests against a control, and the false discovery rate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def paired(effect_P: Floats, control_P: Floats) -> tuple[float, float]:
    """(effect size d_z, two-sided p of Student's paired t) of effect - control over proteins.

    d_z = mean / standard deviation of the differences. Where all differences are equal there is no spread to compare
    with: p is 1 if they are 0, else 0, and d_z is NaN.
    """
    difference_P = effect_P - control_P
    count = len(difference_P)
    mean, spread = float(difference_P.mean()), float(difference_P.std(ddof=1)) if count > 1 else math.nan
    if math.isnan(spread):
        return math.nan, 1.0
    if spread == 0.0:
        return math.nan, 1.0 if mean == 0.0 else 0.0
    size = mean / spread
    return size, student_p(size * math.sqrt(count), count - 1)


def student_p(t: float, freedom: int) -> float:
    """Two-sided p of Student's t: I_x(freedom / 2, 1 / 2) at x = freedom / (freedom + t^2)."""
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t), t * t / (freedom + t * t))


def _incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """Regularised I_x(a, b), `rest` = 1 - x, by its continued fraction (DLMF 8.17.22) with Lentz's method."""
    if x <= 0.0 or rest <= 0.0:
        return float(rest <= 0.0)
    if x > (a + 1) / (a + b + 2):  # where it converges fast
        return 1.0 - _incomplete_beta(b, a, rest, x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)) / a
    tiny = 1e-300
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1) or tiny)
    value = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 / (1.0 + term * d or tiny)
            c = 1.0 + term / c or tiny
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return front * value


def benjamini_hochberg(p_M: Floats) -> Floats:
    """q-values (Benjamini and Hochberg 1995): the smallest false discovery rate at which each is found."""
    count = len(p_M)
    order_M = np.argsort(p_M, kind="stable")
    scaled_M = p_M[order_M] * count / np.arange(1, count + 1)
    q_M = np.empty(count)
    q_M[order_M] = np.minimum(np.minimum.accumulate(scaled_M[::-1])[::-1], 1.0)
    return q_M


def effect_rows(values_VPR: Floats, names: list[str], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a read-out of one steer.

    Args:
        values_VPR: latent, flipped, direction, other x proteins x read-outs.
        names: of the read-outs.
        facts: columns that all rows share.
    """
    rows = []
    for place, name in enumerate(names):
        latent_P, flipped_P, direction_P, other_P = (values_VPR[v, :, place] for v in range(4))
        size, p = paired(latent_P, direction_P)
        size_other, p_other = paired(latent_P, other_P)
        rows.append(
            {
                **facts,
                "readout": name,
                "effect": float(latent_P.mean()),
                "effect_sd": float(latent_P.std(ddof=1)) if len(latent_P) > 1 else 0.0,
                "flipped": float(flipped_P.mean()),
                "direction": float(direction_P.mean()),
                "other": float(other_P.mean()),
                "size": None if math.isnan(size) else size,
                "p": p,
                "size_other": None if math.isnan(size_other) else size_other,
                "p_other": p_other,
                "p_null": paired(other_P, direction_P)[1],
            }
        )
    return rows
