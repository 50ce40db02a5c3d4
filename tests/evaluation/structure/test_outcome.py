"""Means over proteins."""

from __future__ import annotations

from typing import Any

import pytest

from plmsae_cli.evaluation.structure.outcome import FIGURES, summary


def fold(place: int, name: str, mode: str, rmsd: float | None) -> dict[str, Any]:
    return (
        {"place": place, "id": name, "mode": mode, "variant": "sae", "number": None}
        | dict.fromkeys(FIGURES)
        | {"rmsd": rmsd}
    )


def test_proteins_of_one_name_are_two_and_unknown_figures_are_left_out() -> None:
    rows = [fold(p, name, mode, rmsd) for mode, rmsds in {"isolated": (1.0, 2.0, 6.0), "propagated": (1.0, None, 4.0)}.items()
            for p, (name, rmsd) in enumerate(zip(("x_A", "x_A", "y_A"), rmsds, strict=True))]  # fmt: skip
    isolated, propagated = summary(rows, 200)
    assert (isolated["proteins"], isolated["rmsd"]) == (3, pytest.approx(3.0))
    low, high = isolated["interval_rmsd"]
    assert 1.0 <= low < 3.0 < high <= 6.0
    assert propagated["rmsd"] == pytest.approx(2.5)
    assert "tm" not in propagated
