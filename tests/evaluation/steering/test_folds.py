"""Surfaces against a slow Shrake-Rupley, and steered folds against ones spliced by hand."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import plmsae_cli
from plmsae_cli.evaluation.contacts.structure import surface
from plmsae_cli.evaluation.steering.edits import Steer, random_direction
from plmsae_cli.evaluation.steering.folds import READOUTS, measure_folds, shape
from plmsae_cli.evaluation.structure.esmfold import load
from plmsae_cli.evaluation.structure.metrics import compare
from plmsae_cli.evaluation.structure.splicing import spliced
from plmsae_cli.sae.topk import TopK
from plmsae_cli.store.fs import Store

biotite = pytest.importorskip("biotite.structure")
SHARED = Path(plmsae_cli.__file__).parents[2] / "shared" / "data"
SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLI"


def read(code: str) -> Any:
    from biotite.structure.io import pdb

    with gzip.open(SHARED / f"{code}.pdb.gz", "rt") as text:
        atoms = pdb.PDBFile.read(text).get_structure(model=1)
    atoms = atoms[biotite.filter_canonical_amino_acids(atoms)]
    return atoms[atoms.chain_id == atoms.chain_id[0]]


def rolled(atoms: Any, points: int = 200) -> float:
    """A probe of 1.4 rolled over all atoms: the points of each sphere that lie in no other one, by brute force."""
    from biotite.structure.info import vdw_radius_protor

    radius_A = np.array([vdw_radius_protor(r, a) for r, a in zip(atoms.res_name, atoms.atom_name, strict=True)]) + 1.4
    turn = np.pi * (3 - np.sqrt(5)) * np.arange(points)
    height = 1 - 2 * (np.arange(points) + 0.5) / points
    wide = np.sqrt(1 - height**2)
    sphere_P3 = np.stack([wide * np.cos(turn), wide * np.sin(turn), height], axis=1)
    total = 0.0
    for place, radius in enumerate(radius_A):
        far_A = np.linalg.norm(atoms.coord - atoms.coord[place], axis=1)
        near_A = (far_A < radius + radius_A) & (np.arange(len(atoms)) != place)
        points_P3 = atoms.coord[place] + radius * sphere_P3
        apart_PA = np.linalg.norm(points_P3[:, None] - atoms.coord[near_A][None], axis=-1)
        total += 4 * np.pi * radius**2 * (apart_PA >= radius_A[near_A]).all(1).mean()
    return float(total)


@pytest.mark.skipif(not (SHARED / "1fx2.pdb.gz").exists(), reason="needs shared/data/*.pdb.gz")
@pytest.mark.parametrize("code", ["1cs4", "1fx2", "4at1"])
def test_surfaces_of_real_chains(code: str) -> None:
    atoms = read(code)
    assert surface(atoms) == pytest.approx(float(np.nansum(biotite.sasa(atoms, probe_radius=1.4))))
    some = atoms[:600]
    assert surface(some) == pytest.approx(rolled(some), rel=0.01)
    # A chain torn into pieces shows more of itself.
    torn = atoms.copy()
    torn.coord[len(torn) // 2 :] += 200.0
    assert surface(torn) > surface(atoms)


def test_a_steered_fold_is_one_spliced_by_hand() -> None:
    pytest.importorskip("transformers")
    folder = load("random", "bundled", Store(), 0, 5, "esmfold")
    d = folder.trunk.config.hidden_size
    sae = TopK(d, 256, k=8)
    with torch.no_grad():
        sae.w_dec_ND.copy_(torch.randn(256, d, generator=torch.Generator().manual_seed(0)))
        sae.normalize_decoder()
        sae.w_enc_ND.copy_(sae.w_dec_ND)
    sae.maximum_N.fill_(100.0)
    steer = Steer(3, 9, 2.0)
    base, found = measure_folds(folder, sae, 5, SEQUENCE, [steer], "add", [2, 30], False)
    assert found.shape == (1, 4, len(READOUTS))
    assert base.sasa == surface(folder.atoms(folder.fold(SEQUENCE)))
    row_D = sae.w_dec_ND[3]
    pushes = [200.0 * row_D, -200.0 * row_D, 200.0 * random_direction(row_D, 3), 200.0 * sae.w_dec_ND[9]]
    for variant, push_D in enumerate(pushes):

        def moved(x: torch.Tensor, push_D: torch.Tensor = push_D) -> torch.Tensor:
            x = x.clone()
            x[[1, 29]] += push_D.detach()
            return x

        with spliced(folder.trunk, 5, "propagated", moved):
            now = shape(folder, SEQUENCE)
        wanted = [100 * (now.sasa / base.sasa - 1), now.contacts - base.contacts]
        wanted += [compare(now.alpha_L3, base.alpha_L3)["rmsd"], now.plddt - base.plddt]
        np.testing.assert_allclose(found[0, variant].numpy(), wanted, rtol=1e-2, atol=0.01)
        assert found[0, variant, READOUTS.index("RMSD")] > 0.05
