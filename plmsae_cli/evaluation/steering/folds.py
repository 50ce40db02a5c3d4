"""What steering does to the structure that ESMFold predicts: every fold with the steered layer, all later ones anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from plmsae_cli.evaluation.contacts.precision import SEPARATION
from plmsae_cli.evaluation.contacts.structure import CONTACT, surface
from plmsae_cli.evaluation.steering.edits import VARIANTS, Mode, Steer, edit
from plmsae_cli.evaluation.structure.esmfold import ESMFold
from plmsae_cli.evaluation.structure.metrics import Coordinates, rmsd
from plmsae_cli.evaluation.structure.splicing import spliced
from plmsae_cli.sae.dictionary import Dictionary

READOUTS = ("SASA", "contacts", "RMSD", "pLDDT")
"""Change of the solvent-accessible surface in percent; of the long-range contacts (CB) for each residue; distance to the fold
untouched, in angstrom; change of the mean pLDDT, in points."""


class Shape(NamedTuple):
    """What is read of one fold."""

    sasa: float
    """Solvent-accessible surface of all residues, in square angstrom."""
    contacts: float
    """Long-range contacts a residue."""
    plddt: float
    alpha_L3: Coordinates


def shape(folder: ESMFold, sequence: str) -> Shape:
    """Fold, and read."""
    fold = folder.fold(sequence)
    atoms = folder.atoms(fold)
    beta = atoms[((atoms.res_name == "GLY") & (atoms.atom_name == "CA")) | (atoms.atom_name == "CB")]
    apart_LL = np.linalg.norm(beta.coord[:, None] - beta.coord[None], axis=-1)
    far_LL = beta.res_id[None] - beta.res_id[:, None] >= SEPARATION
    contacts = int((far_LL & (apart_LL < CONTACT)).sum())
    return Shape(surface(atoms), contacts / len(sequence), float(fold.plddt_L.mean()), fold.alpha_L3)


def measure_folds(
    folder: ESMFold,
    sae: Dictionary,
    layer: int,
    sequence: str,
    steers: Sequence[Steer],
    mode: Mode,
    positions: Sequence[int] | None,
    only_active: bool,
    check_stop: Callable[[], None] = lambda: None,
) -> tuple[Shape, torch.Tensor]:
    """The fold untouched, and [steers, variants, read-outs] of one protein, float64.

    Args:
        positions: residues steered, from 1; None: all.
    """
    base = shape(folder, sequence)
    place_L = torch.arange(1, len(sequence) + 1, device=folder.device)
    where_L1 = torch.ones_like(place_L, dtype=torch.bool)[:, None]
    if positions is not None:
        where_L1 = torch.isin(place_L, torch.tensor(list(positions), device=folder.device))[:, None]
    found = torch.empty(len(steers), len(VARIANTS), len(READOUTS), dtype=torch.float64)
    for row, steer in enumerate(steers):
        for column, variant in enumerate(VARIANTS):
            check_stop()
            with spliced(folder.trunk, layer, "propagated", edit(sae, steer, variant, mode, where_L1, only_active)):
                now = shape(folder, sequence)
            found[row, column] = torch.tensor(
                [
                    100.0 * (now.sasa / base.sasa - 1.0),
                    now.contacts - base.contacts,
                    rmsd(now.alpha_L3, base.alpha_L3),
                    now.plddt - base.plddt,
                ],
                dtype=torch.float64,
            )
    return base, found
