"""Chains and contacts of structures, against biotite's own distances and against a chain made by hand."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

import plmsae_cli
from plmsae_cli.browse.structures import match
from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.contacts.structure import place_in, read_chain, read_residues, split_chain

pytest.importorskip("biotite")
CHAINS = {"1cs4": "ABC", "1fx2": "A", "4at1": "ABCD"}
SHARED = Path(plmsae_cli.__file__).parents[2] / "shared" / "data"


def pdb_line(serial: int, atom: str, residue: str, chain: str, number: int, x: float, hetero: bool = False) -> str:
    record = "HETATM" if hetero else "ATOM  "
    place = f"{residue:>3} {chain}{number:4d}    {x:8.3f}{0:8.3f}{0:8.3f}"
    return f"{record}{serial:5d}  {atom:<3} {place}  1.00  0.00           {atom[0]}"


def write(path: Path, seqres: str | None = None) -> Path:
    """Chain A: ALA 2, GLY 3 (no CB), MSE 5 (modified), SER 6 without CB, 7.999 and 8.000 angstrom from the first."""
    lines = [] if seqres is None else [f"SEQRES   1 A {len(seqres.split()):4d}  {seqres}"]
    atoms = [
        ("CA", "ALA", 2, 50.0, False), ("CB", "ALA", 2, 0.0, False),
        ("CA", "GLY", 3, 7.999, False),
        ("CA", "MSE", 5, 60.0, True), ("CB", "MSE", 5, 8.0, True),
        ("CA", "SER", 6, 1.0, False),
    ]  # fmt: skip
    for serial, (atom, residue, number, x, hetero) in enumerate(atoms, 1):
        lines.append(pdb_line(serial, atom, residue, "A", number, x, hetero))
    lines.append(pdb_line(9, "CA", "TRP", "B", 1, 0.0))
    lines.append(pdb_line(10, "O", "HOH", "A", 99, 0.0, True))
    path.write_text("\n".join([*lines, "END", ""]))
    return path


def test_a_chain_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pdb")
    chain = read_chain(path, str(path), None, "resolved")
    assert (chain.name, chain.sequence) == ("x_A", "AGMS")
    assert chain.known_L.tolist() == [True, True, True, False]  # the serine's CB is missing
    wanted = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=bool)  # 8.0 is none
    assert (chain.contacts() == wanted).all()
    assert read_chain(path, str(path), "B", "resolved").sequence == "W"
    assert [letters for letters, _ in read_residues(path, str(path))] == ["AGMS", "W"]
    with pytest.raises(UserError, match=r"x.pdb has no chain 'C'"):
        read_residues(path, str(path), "C")


def test_a_chromophore_is_the_residues_it_is_made_of(tmp_path: Path) -> None:
    names = ["PHE", "GLY", "CRO", "VAL", "GLN"]
    atoms = [("CA1" if name == "CRO" else "CA", name, 3 * n, 8.0 * n) for n, name in enumerate(names)]
    lines = [pdb_line(n, atom, name, "A", number, x, name == "CRO") for n, (atom, name, number, x) in enumerate(atoms)]
    path = tmp_path / "x.pdb"
    path.write_text("\n".join(["SEQRES   1 A    6  MET " + " ".join(names), *lines, "END", ""]))
    chain = read_chain(path, str(path), None, "resolved")
    assert chain.sequence == "FGTYGVQ"
    assert chain.alpha_L3[:, 0].tolist() == pytest.approx([0, 8, *[np.nan] * 3, 24, 32], nan_ok=True)
    whole = read_chain(path, str(path), None, "seqres")
    assert whole.sequence == "MFGTYGVQ"
    np.testing.assert_array_equal(whole.alpha_L3[1:], chain.alpha_L3)
    (one,) = match([str(path)], {7: {"id": "P", "sequence": "FGTYGVQ"}}).values()
    assert [int(line[22:26]) for line in one.splitlines() if line.startswith("ATOM")] == [1, 2, 3, 6, 7]


def test_unresolved_residues_are_in_the_sequence_and_not_scored(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pdb", "LYS ALA GLY TRP MSE SER LYS")
    chain = read_chain(path, str(path), "A", "seqres")
    assert chain.sequence == "KAGWMSK"
    assert chain.known_L.tolist() == [False, True, True, False, True, False, False]
    assert chain.beta_L3[4, 0] == 8.0


def test_without_numbers_that_fit_residues_are_aligned() -> None:
    assert place_in("AGMS", [2, 3, 5, 6], "KAGWMSK").tolist() == [1, 2, 4, 5]  # one offset explains all
    assert place_in("WYAG", [1, 2, 3, 4], "KKWYMMMMAGKK").tolist() == [2, 3, 8, 9]
    assert place_in("MAAK", [51, 52, 52, 53], "MAKMAAK").tolist() == [3, 4, 5, 6]  # 52 and 52A
    with pytest.raises(UserError, match="no place"):
        place_in("WWWWWWWW", list(range(8)), "WWWW")


def test_what_users_get_wrong(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pdb")
    with pytest.raises(UserError, match="no chain 'Z'") as caught:
        read_chain(path, str(path), "Z", "resolved")
    assert "A, B" in str(caught.value.hint)
    with pytest.raises(UserError, match="no SEQRES"):
        read_chain(path, str(path), "A", "seqres")
    (tmp_path / "bad.cif").write_text("nothing")
    with pytest.raises(UserError, match=r"bad\.cif"):
        read_chain(tmp_path / "bad.cif", str(tmp_path / "bad.cif"), None, "resolved")


def test_the_chain_is_named_after_a_colon() -> None:
    assert split_chain("a/1cs4.pdb.gz:B") == ("a/1cs4.pdb.gz", "B")
    assert split_chain("s3://bucket/1cs4.cif") == ("s3://bucket/1cs4.cif", None)
    assert split_chain("1cs4.cif:AA") == ("1cs4.cif", "AA")


@pytest.mark.skipif(not (SHARED / "1fx2.pdb.gz").exists(), reason="needs shared/data/*.pdb.gz")
@pytest.mark.parametrize(("code", "chain"), [(code, chain) for code, chains in CHAINS.items() for chain in chains])
def test_real_contacts_are_biotites(code: str, chain: str, tmp_path: Path) -> None:
    import biotite.structure as biotite
    from biotite.structure.io import pdb, pdbx

    path = SHARED / f"{code}.pdb.gz"
    found = read_chain(path, str(path), chain, "resolved")
    with gzip.open(path, "rt") as text:
        atoms = pdb.PDBFile.read(text).get_structure(model=1)
    atoms = atoms[(atoms.chain_id == chain) & biotite.filter_canonical_amino_acids(atoms)]
    beta = atoms[
        ((atoms.res_name == "GLY") & (atoms.atom_name == "CA"))
        | ((atoms.res_name != "GLY") & (atoms.atom_name == "CB"))
    ]
    known = np.flatnonzero(found.known_L)
    assert len(known) == len(beta)
    distances = np.stack([biotite.distance(beta.coord[n], beta.coord) for n in range(len(beta))])
    np.testing.assert_allclose(found.distances()[np.ix_(known, known)], distances, atol=1e-4)
    cells = biotite.CellList(beta, cell_size=8.0).create_adjacency_matrix(8.0)
    assert (found.contacts()[np.ix_(known, known)] == cells).all()
    # The same from mmCIF, and unresolved ends known from what was crystallised.
    cif = pdbx.CIFFile()
    pdbx.set_structure(cif, atoms, data_block=code)
    cif.write(str(tmp_path / f"{code}.cif"))
    again = read_chain(tmp_path / f"{code}.cif", f"{code}.cif", chain, "resolved")
    assert again.sequence == found.sequence
    assert (again.contacts() == found.contacts()).all()
    whole = read_chain(path, str(path), chain, "seqres")
    assert whole.known_L.sum() == len(known)
    pairs = list(
        zip(np.array(list(whole.sequence))[whole.known_L], np.array(list(found.sequence))[found.known_L], strict=True)
    )
    assert sum(a != b for a, b in pairs) == (code == "4at1" and chain in "BD")  # which have D where N was deposited
