"""A protein's sequence and its contacts, from an experimental structure (PDB or mmCIF, plain or gzip)."""

from __future__ import annotations

import gzip
import io
import platform
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plmsae_cli.config.errors import UserError

Coordinates = npt.NDArray[np.float64]
ENDINGS = (".pdb", ".ent", ".cif", ".mmcif")
CONTACT = 8.0
"""Angstrom between CB atoms (CA of glycine), strictly less (Moult et al., CASP)."""


@dataclass(frozen=True)
class Chain:
    """One chain: letters L, and where its residues are."""

    name: str
    sequence: str
    beta_L3: Coordinates
    """CB, or CA of glycine, in angstrom; NaN where it was not resolved."""
    alpha_L3: Coordinates
    """CA; NaN where it was not resolved."""

    @property
    def known_L(self) -> npt.NDArray[np.bool_]:
        known_L: npt.NDArray[np.bool_] = np.isfinite(self.beta_L3[:, 0])
        return known_L

    def distances(self) -> Coordinates:
        """[L, L], NaN where either residue is not resolved."""
        squared_LL: Coordinates = np.square(self.beta_L3[:, None] - self.beta_L3[None]).sum(-1)
        return np.sqrt(squared_LL)

    def contacts(self) -> npt.NDArray[np.bool_]:
        """[L, L]: closer than 8 angstrom, false where unknown."""
        return self.distances() < CONTACT


def split_chain(structure: str) -> tuple[str, str | None]:
    """`file:CHAIN` as (file, chain); (file, None) without one."""
    file, colon, chain = structure.rpartition(":")
    if colon and file.removesuffix(".gz").endswith(ENDINGS):
        return file, chain
    return structure, None


def read_chain(path: Path, name: str, chain: str | None, sequence: str) -> Chain:
    """One chain of the first model.

    Args:
        path: a local file.
        name: what users call it.
        chain: its (author's) id; None takes the first chain that has amino acids.
        sequence: `resolved`: residues with coordinates, one after the other; `seqres`: all that were in the crystal, those
            without coordinates unknown.

    Raises:
        UserError: biotite is absent, the file cannot be read, or has no such chain.
    """
    file, atoms = _amino_acids(path, name)
    chains = _chains(atoms, name, chain)
    if not chains:
        raise UserError(f"{name} has no amino acids", "name a structure of a protein")
    chosen = chains[0]
    whole, residues = _residues(atoms[atoms.chain_id == chosen])
    places_L23 = np.array(  # of CB and CA together
        [
            [_place(residue, "CA" if letter == "G" else "CB"), _place(residue, "CA")]
            for letter, residue in zip(whole, residues, strict=True)
        ],
        dtype=np.float64,
    )
    if sequence == "seqres":
        numbers = [int(residue.res_id[0]) for residue in residues]
        deposited = _deposited(file, chosen, name)
        places_L23 = _spread(places_L23, place_in(whole, numbers, deposited), len(deposited))
        whole = deposited
    stem = Path(name).name.removesuffix(".gz").rpartition(".")[0]
    return Chain(f"{stem}_{chosen}", whole, places_L23[:, 0], places_L23[:, 1])


def onto(chain: Chain, sequence: str) -> Chain:
    """The chain's coordinates at the residues of another sequence of the same protein.

    Raises:
        UserError: some of its residues have no place there.
    """
    where = place_in(chain.sequence, list(range(1, len(chain.sequence) + 1)), sequence)
    both = np.stack([chain.beta_L3, chain.alpha_L3], axis=1)
    spread = _spread(both, where, len(sequence))
    return Chain(chain.name, sequence, spread[:, 0], spread[:, 1])


def _place(residue: Any, atom: str) -> Any:
    found = residue.coord[residue.atom_name == atom]
    return found[0] if len(found) else np.full(3, np.nan)


def _spread(places: Coordinates, where: npt.NDArray[np.int64], length: int) -> Coordinates:
    found = np.full((length, *places.shape[1:]), np.nan)
    found[where] = places
    return found


def require_biotite() -> None:
    """Raises UserError, before anything is made, where structures could not be read later."""
    if find_spec("biotite") is None:
        raise _without_biotite()


def _without_biotite() -> UserError:
    """What to install: the extra leaves it out where there is no build of it."""
    if platform.machine() == "aarch64":
        hint = "there is no build of it for aarch64: `pip install biotite` compiles it, which needs a C compiler"
    else:
        hint = "pip install 'plmsae[fold]'"
    return UserError("structures are read by biotite, which is not installed", hint)


def read_residues(path: Path, name: str, chain: str | None = None) -> list[tuple[str, list[Any]]]:
    """Letters and residues, as `_residues` has them, of each chain of amino acids of the first model, or of the one asked for.

    Raises:
        UserError: biotite is absent, the file cannot be read, or has no such chain.
    """
    _, atoms = _amino_acids(path, name)
    return [_residues(atoms[atoms.chain_id == one]) for one in _chains(atoms, name, chain)]


def _chains(atoms: Any, name: str, wanted: str | None) -> list[str]:
    """Those there are, or the one that is wanted. Raises UserError where it is not there."""
    chains = list(dict.fromkeys(atoms.chain_id.tolist()))
    if wanted is None or not chains:
        return chains
    if wanted not in chains:
        raise UserError(f"{name} has no chain {wanted!r} of amino acids", f"its chains: {', '.join(chains)}")
    return [wanted]


def _residues(atoms: Any) -> tuple[str, list[Any]]:
    """Letters of one chain, and the residue (an array of atoms) of each: of a chromophore such as CRO, which is TYG, three
    times the same."""
    from biotite.structure import get_residue_starts
    from biotite.structure.info import one_letter_code

    letters, residues = "", []
    for start, stop in pairwise(get_residue_starts(atoms, add_exclusive_stop=True)):
        code = one_letter_code(atoms.res_name[start]) or "X"
        letters += code
        residues += [atoms[start:stop]] * len(code)
    return letters, residues


def atoms_of(pdb_text: str) -> Any:
    """Biotite's array of the atoms in the text of a PDB file."""
    from biotite.structure.io import pdb

    return pdb.PDBFile.read(io.StringIO(pdb_text)).get_structure(model=1)


def surface(atoms: Any) -> float:
    """Solvent-accessible surface of an array of atoms, in square angstrom (Shrake and Rupley 1973, by Biotite: probe of 1.4,
    1,000 points an atom, radii of ProtOr). Atoms without a radius, such as hydrogens, do not count."""
    from biotite.structure import sasa

    return float(np.nansum(sasa(atoms)))


def _amino_acids(path: Path, name: str) -> tuple[Any, Any]:
    """The file, and the atoms of amino acids of its first model."""
    try:
        from biotite.structure import filter_amino_acids
        from biotite.structure.io import pdb, pdbx
    except ImportError as error:
        raise _without_biotite() from error
    try:
        packed = name.endswith(".gz")
        with gzip.open(path, "rt") if packed else path.open() as text:
            if name.removesuffix(".gz").endswith((".cif", ".mmcif")):
                file: Any = pdbx.CIFFile.read(text)
                atoms = pdbx.get_structure(file, model=1, altloc="first")
            else:
                file = pdb.PDBFile.read(text)
                atoms = file.get_structure(model=1, altloc="first")
    except (OSError, ValueError, KeyError, EOFError, IndexError) as error:
        raise UserError(f"{name} is no structure that biotite reads: {error}", "give a PDB or mmCIF file") from error
    return file, atoms[filter_amino_acids(atoms)]


def _deposited(file: Any, chain: str, name: str) -> str:
    """The sequence that was in the crystal."""
    from biotite.structure.info import one_letter_code
    from biotite.structure.io import pdbx

    found = ""
    if isinstance(file, pdbx.CIFFile):
        entry = file.block.get("pdbx_poly_seq_scheme")
        if entry is not None:
            rows = zip(entry["pdb_strand_id"].as_array(str), entry["mon_id"].as_array(str), strict=True)
            found = "".join(one_letter_code(monomer) or "X" for strand, monomer in rows if strand == chain)
    else:
        lines = [line for line in file.lines if line.startswith("SEQRES") and line[11] == chain]
        found = "".join(one_letter_code(residue) or "X" for line in lines for residue in line[19:70].split())
    if not found:
        raise UserError(f"{name} does not say what chain {chain} is made of (no SEQRES)", "set sequence: resolved")
    return found


def place_in(resolved: str, numbers: list[int], deposited: str) -> npt.NDArray[np.int64]:
    """Where in the deposited sequence each resolved residue stands.

    By residue numbers where one offset explains all letters, else by a global alignment: so also where numbers repeat (52 and
    52A) or fall.
    """
    ascending = all(first < second for first, second in pairwise(numbers))
    for offset in range(-min(numbers), len(deposited) - max(numbers)) if ascending else ():
        if all(deposited[number + offset] == letter for number, letter in zip(numbers, resolved, strict=True)):
            return np.array(numbers) + offset
    from biotite.sequence import Alphabet, GeneralSequence
    from biotite.sequence.align import SubstitutionMatrix, align_optimal

    alphabet = Alphabet(sorted(set(resolved + deposited)))
    size = len(alphabet)
    matrix = SubstitutionMatrix(alphabet, alphabet, np.where(np.eye(size, dtype=bool), 5, -8).astype(np.int32))
    pair = [GeneralSequence(alphabet, list(text)) for text in (resolved, deposited)]
    trace: npt.NDArray[np.int64] = align_optimal(
        *pair, matrix, gap_penalty=(-10, -1), terminal_penalty=False, max_number=1
    )[0].trace
    both = trace[(trace >= 0).all(1)]
    if len(both) < len(resolved):
        raise UserError(
            f"{len(resolved) - len(both)} resolved residues have no place in the deposited sequence",
            "set sequence: resolved",
        )
    where: npt.NDArray[np.int64] = both[:, 1].astype(np.int64)
    return where
