"""Structures given by a user, matched to proteins and renumbered by them: residue n of the model is residue n of the protein."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.contacts.structure import ENDINGS, read_residues, split_chain

if TYPE_CHECKING:
    from plmsae_cli.browse.features import Row

ALIKE = 0.9
"""Share of a chain's residues that must be found, in order, in the protein."""


def find(paths: Sequence[str]) -> list[str]:
    """Structure files, `file:CHAIN` as they are, folders as the files in them.

    Raises UserError where there is none.
    """
    found: list[str] = []
    for path in paths:
        if Path(path).is_dir():
            found += sorted(str(one) for one in Path(path).iterdir() if one.name.removesuffix(".gz").endswith(ENDINGS))
        else:
            found.append(path)
    if paths and not found:
        raise UserError(
            f"no structure in {', '.join(paths)}", "PDB or mmCIF files are wanted: .pdb, .ent, .cif, plain or .gz"
        )
    return found


def match(paths: Iterable[str], proteins: dict[int, Row]) -> dict[int, str]:
    """Coordinates, as a PDB file of one chain, of each protein that has a structure.

    A file whose name contains a protein's id or accession belongs to it (`P12345.pdb`, `AF-P12345-F1-model_v4.cif.gz`);
    another one to the protein whose sequence has its chain, up to unresolved residues.

    Raises:
        UserError: biotite is absent, or a file cannot be read.
    """
    by_name: dict[str, list[int]] = {}
    for number, row in proteins.items():
        for name in {row["id"].lower(), *row["id"].lower().split("|")} - {""}:
            by_name.setdefault(name, []).append(number)
    found: dict[int, str] = {}
    for path in paths:
        name, chain = split_chain(path)
        words = set(re.split(r"[^a-z0-9|]+", Path(name).name.lower())) | {Path(name).name.lower().partition(".")[0]}
        named = sorted({number for word in words for number in by_name.get(word, ())})
        for letters, atoms in read_residues(Path(name), name, chain):
            for number in named or proteins:
                if number not in found and (place := _place(letters, proteins[number]["sequence"])):
                    found[number] = _pdb(atoms, place)
    return found


def _place(letters: str, sequence: str) -> list[int]:
    """Position (from 1) in the sequence of each residue, 0 for those without; [] where the chain is of another protein."""
    if (start := sequence.find(letters)) >= 0:
        return list(range(start + 1, start + len(letters) + 1))
    if not {letters[i : i + 8] for i in range(0, max(1, len(letters) - 7), 4)} & {
        sequence[i : i + 8] for i in range(max(1, len(sequence) - 7))
    }:
        return []
    place = np.zeros(len(letters), dtype=int)
    for a, b, size in SequenceMatcher(None, letters, sequence, autojunk=False).get_matching_blocks():
        place[a : a + size] = np.arange(b + 1, b + size + 1)
    return place.tolist() if (place > 0).mean() >= ALIKE else []


def _pdb(residues: Sequence[Any], place: Sequence[int]) -> str:
    lines: list[str] = []
    last = None
    for residue, number in zip(residues, place, strict=True):
        if residue is last or number == 0 or number > 9999:
            continue
        last = residue
        for atom in residue:
            x, y, z = atom.coord
            label = atom.atom_name if len(atom.atom_name) == 4 else f" {atom.atom_name}"
            lines.append(
                f"ATOM  {len(lines) + 1:5}"[:11] + f" {label:<4} {atom.res_name:>3} A{number:4}    "
                f"{x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00          {atom.element:>2}"
            )
    return "\n".join([*lines, "TER", "END", ""])
