"""Distances between folds, against Biotite's values on real chains and against what is known by hand."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import plmsae_cli
from plmsae_cli.evaluation.structure.metrics import Coordinates, compare, lddt, superpose, tm_score

biotite = pytest.importorskip("biotite.structure")
pytest.importorskip("tmtools")
SHARED = Path(plmsae_cli.__file__).parents[2] / "shared" / "data"


def helix(length: int = 40) -> Coordinates:
    turn = np.deg2rad(100.0) * np.arange(length)
    return np.stack([2.3 * np.cos(turn), 2.3 * np.sin(turn), 1.5 * np.arange(length)], axis=1)


def rotation(seed: int) -> Coordinates:
    found, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return found * np.sign(np.linalg.det(found))


def test_a_turned_and_moved_fold_is_the_same_and_its_mirror_image_is_not() -> None:
    x = helix()
    same = compare(x @ rotation(1) + [10.0, -4.0, 3.0], x)
    assert same["rmsd"] == pytest.approx(0.0, abs=1e-6)
    assert same["mean_distance"] == pytest.approx(0.0, abs=1e-6)
    assert same["tm"] == pytest.approx(1.0, abs=1e-6)
    assert same["lddt"] == 1.0
    mirrored = compare(x * [1.0, 1.0, -1.0], x)
    assert mirrored["rmsd"] > 1.0
    assert mirrored["lddt"] == 1.0  # which sees distances alone


def test_rmsd_is_no_mean_distance() -> None:
    """Two points of a long line moved sideways by 3 in opposite directions: the superposition stays, sums are known."""
    x = np.zeros((1002, 3))
    x[:, 0] = 3.8 * np.arange(1002)
    moved = x.copy()
    moved[500, 1], moved[501, 1] = 3.0, -3.0
    found = compare(moved, x)
    assert found["rmsd"] == pytest.approx(math.sqrt(18 / 1002), rel=1e-3)
    assert found["mean_distance"] == pytest.approx(6 / 1002, rel=2e-2)


def test_lddt_by_hand() -> None:
    """Four points on a line, 6 apart; the last is moved away by 1.5: pairs (0,1) (1,2) (0,2) are kept, (2,3) and (1,3) are off
    by 1.5, kept at tolerances 2 and 4; (0,3) is 18 apart and does not count."""
    x = np.zeros((4, 3))
    x[:, 0] = 6.0 * np.arange(4)
    moved = x.copy()
    moved[3, 0] += 1.5
    assert lddt(moved, x) == pytest.approx((3 + 2 * 0.5) / 5)
    assert math.isnan(lddt(x[:1], x[:1]))


def test_unknown_residues_are_left_out() -> None:
    x = helix()
    y = x + np.random.default_rng(0).normal(size=x.shape)
    holes = x.copy()
    holes[[0, 7, 39]] = np.nan
    keep = np.isfinite(holes[:, 0])
    assert compare(y, holes) == compare(y[keep], x[keep])
    assert all(math.isnan(value) for value in compare(y[:2], x[:2]).values())


@pytest.mark.skipif(not (SHARED / "1fx2.pdb.gz").exists(), reason="needs shared/data/*.pdb.gz")
@pytest.mark.parametrize("code", ["1cs4", "1fx2", "4at1"])
def test_real_chains_moved_by_known_noise_have_biotites_values(code: str) -> None:
    from biotite.structure.io import pdb

    with gzip.open(SHARED / f"{code}.pdb.gz", "rt") as text:
        atoms: Any = pdb.PDBFile.read(text).get_structure(model=1)
    alpha = atoms[(atoms.atom_name == "CA") & biotite.filter_amino_acids(atoms)]
    alpha = alpha[alpha.chain_id == alpha.chain_id[0]]
    x = alpha.coord.astype(np.float64)
    draw = np.random.default_rng(0)
    for scale in (0.3, 2.0, 8.0):
        y = (x + draw.normal(scale=scale, size=x.shape)) @ rotation(3) + 20.0
        found = compare(y, x)
        model = alpha.copy()
        model.coord = y.astype(np.float32)
        fitted, _ = biotite.superimpose(alpha, model)
        assert found["rmsd"] == pytest.approx(float(biotite.rmsd(alpha, fitted)), rel=1e-4)
        apart = biotite.distance(alpha, fitted)
        assert found["mean_distance"] == pytest.approx(float(apart.mean()), rel=1e-4)
        assert found["mean_distance"] < found["rmsd"]
        assert found["lddt"] == pytest.approx(float(biotite.lddt(alpha, model)), abs=2e-3)
        np.testing.assert_allclose(superpose(y, x), fitted.coord, atol=2e-3)
        # Biotite scores a given superposition, of which tmtools looks for the best: never below least squares'.
        places = np.arange(len(x))
        fixed = float(biotite.tm_score(alpha, fitted, places, places))
        assert found["tm"] >= fixed - 1e-4
        from tmtools import tm_align

        letters = "A" * len(x)
        best = tm_align(y, x, letters, letters, alignment=[letters, letters])
        fitted.coord = (y @ np.asarray(best.u).T + np.asarray(best.t)).astype(np.float32)
        assert tm_score(y, x) == pytest.approx(float(biotite.tm_score(alpha, fitted, places, places)), abs=1e-4)
