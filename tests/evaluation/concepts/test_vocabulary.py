"""From UniProt's text to residues: positions, labels and repeats, with what published readers get wrong."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.annotations.entries import Entry, Feature, position, read_entries
from plmsae_cli.evaluation.annotations.uniprot_flat import tidy
from plmsae_cli.evaluation.annotations.uniprot_table import cell_features
from plmsae_cli.evaluation.concepts.vocabulary import Labels, find_concepts

TABLE = """\
Entry\tLength\tSequence\tBinding site\tCofactor\tSignal peptide\tDomain [FT]\tDisulfide bond\tModified residue\tPfam
P1\t12\tMKVACDEFGHIK\tBINDING 3; /ligand="Zn(2+)"; /ligand_id="ChEBI:29105"; BINDING 5..6; /ligand="ATP"\t\
COFACTOR: Name=Zn(2+); Xref=ChEBI:CHEBI:29105; Evidence={ECO:1};\tSIGNAL 1..4; /evidence="ECO:7"\t\
DOMAIN 2..4; /note="EGF-like 1; calcium-binding"; /evidence="x; DOMAIN 9"; DOMAIN 6..8; /note="EGF-like 2"\t\
DISULFID 5..11; /evidence="ECO:1"\tMOD_RES 2; /note="Phosphoserine; by PKA"; MOD_RES 2; /note="Phosphoserine; by PKC"\tPF1;PF2;
P2\t5\tmkvac\t\tCOFACTOR: Name=FAD; Xref=ChEBI:1;\t\tDOMAIN 4..>9; /note="SH3"\tDISULFID ?..4\t\t
"""

FLAT = """\
ID   A_TEST                  Reviewed;          12 AA.
AC   P1;
CC   -!- COFACTOR:
CC       Name=Zn(2+); Xref=ChEBI:CHEBI:29105;
CC         Evidence={ECO:0000250};
DR   Pfam; PF00001; 7tm_1; 1.
FT   SIGNAL          1..4
FT                   /evidence="ECO:0000269"
FT   BINDING         3
FT                   /ligand="Zn(2+)"
FT                   /ligand_id="ChEBI:CHEBI:29105"
FT   DOMAIN          <2..4
FT                   /note="EGF-like 1; calcium-binding"
FT   DISULFID        5..11
FT   HELIX           ?..4
SQ   SEQUENCE   12 AA;  1000 MW;  0000000000000000 CRC64;
     MKVACDEFGH IK
//
ID   B_TEST                  Reviewed;          12 AA.
AC   P2;
FT   SIGNAL        1      4       By similarity.
FT   METAL         3      3       Zinc 1 (By similarity).
FT   DOMAIN        2      4       EGF-like 1 (Potential).
FT   DOMAIN        6      8       Potential.
SQ   SEQUENCE   12 AA;  1000 MW;  0000000000000000 CRC64;
     MKVACDEFGH IK
//
"""


def where(labels: Labels, name: str) -> list[tuple[int, int, int, int]]:
    """(protein, start, stop, instance) of a concept's ranges, instances numbered from 0."""
    number = [concept.name for concept in labels.concepts].index(name)
    rows = labels.concept_M == number
    columns = (labels.protein_M, labels.start_M, labels.stop_M, labels.instance_M - labels.instance_M[rows].min())
    return list(zip(*(column[rows].tolist() for column in columns), strict=True))


def names(labels: Labels) -> set[str]:
    return {concept.name for concept in labels.concepts}


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("7", (7, 7)), ("3..9", (3, 9)), ("<1..9", (1, 9)), ("3..>9", (3, 9)), ("?..9", None), ("?3..9", None),
        ("?", None), ("P12345-2:3..9", None), ("9..3", None), ("0..3", None), ("x", None),
    ],
)  # fmt: skip
def test_positions(text: str, ends: tuple[int, int] | None) -> None:
    assert position(text) == ends


def test_a_cell_is_split_at_features_and_not_inside_quotes() -> None:
    cell = 'DOMAIN 2..4; /note="a ""b"" DOMAIN 7; x"; /evidence="y"; DOMAIN 6; DOMAIN ?..8; /note="lost"'
    assert cell_features("DOMAIN", cell) == [
        Feature("DOMAIN", 2, 4, note='a ""b"" DOMAIN 7; x'),
        Feature("DOMAIN", 6, 6),
    ]


@pytest.fixture(params=["plain", "gzip"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> list[Entry]:
    path = tmp_path / "table.tsv"
    path.write_bytes(TABLE.encode() if request.param == "plain" else gzip.compress(TABLE.encode()))
    return list(read_entries(path))


def test_positions_are_from_one_and_inclusive(table: list[Entry]) -> None:
    labels = find_concepts(table, "strict", 1)
    # DOMAIN 2..4 of MKVACDEFGHIK is KVA: residues 1, 2, 3 counted from 0.
    assert where(labels, "Domain [FT]: EGF-like") == [(0, 1, 4, 0), (0, 5, 8, 2)]
    assert where(labels, "Domain [FT]: SH3") == [(1, 3, 5, 0)]  # 4..>9 of five residues ends with the protein
    assert table[1].sequence == "MKVAC"
    assert table[0].families == ("PF1", "PF2")


def test_labels_are_read_where_each_kind_keeps_them(table: list[Entry]) -> None:
    labels = find_concepts(table, "strict", 1)
    assert where(labels, "Binding site: Zn(2+)") == [(0, 2, 3, 0)]
    assert where(labels, "Binding site: ATP") == [(0, 4, 6, 0)]
    assert where(labels, "Signal peptide") == [(0, 0, 4, 0)]
    # A cofactor lies where its ligand binds; FAD binds nowhere that the entry tells.
    assert where(labels, "Cofactor: Zn(2+)") == [(0, 2, 3, 0)]
    assert labels.without_place == 1
    compat = find_concepts(table, "interplm_compat", 1)
    assert not {n for n in names(compat) if n.startswith(("Binding", "Cofactor", "Signal"))}


def test_numbered_repeats_are_one_concept_in_strict_and_apart_in_compat(table: list[Entry]) -> None:
    assert {n for n in names(find_concepts(table, "strict", 2)) if n.startswith("Domain")} == {
        "Domain [FT]: EGF-like", "Domain [FT]: any",
    }  # fmt: skip
    compat = names(find_concepts(table, "interplm_compat", 1))
    assert {"Domain [FT]: EGF-like 1", "Domain [FT]: EGF-like 2"} <= compat
    assert not {n for n in names(find_concepts(table, "interplm_compat", 2)) if n.startswith("Domain")}


def test_a_bond_is_its_two_ends_and_an_unknown_end_is_none(table: list[Entry]) -> None:
    assert where(find_concepts(table, "strict", 1), "Disulfide bond") == [(0, 4, 5, 0), (0, 10, 11, 0)]


def test_the_same_label_said_twice_of_a_residue_is_one_instance(table: list[Entry]) -> None:
    assert where(find_concepts(table, "strict", 1), "Modified residue: Phosphoserine") == [(0, 1, 2, 0)]
    assert len(where(find_concepts(table, "interplm_compat", 1), "Modified residue: Phosphoserine")) == 2


def test_flat_files_say_the_same_in_old_and_new_syntax(tmp_path: Path) -> None:
    pytest.importorskip("Bio")
    path = tmp_path / "two.dat"
    path.write_text(FLAT)
    new, old = read_entries(path)
    assert (new.accession, new.sequence, new.families) == ("P1", "MKVACDEFGHIK", ("PF00001",))
    assert set(new.features) == {
        Feature("SIGNAL", 1, 4), Feature("BINDING", 3, 3, ligand="Zn(2+)"), Feature("DISULFID", 5, 11),
        Feature("DOMAIN", 2, 4, note="EGF-like 1; calcium-binding"), Feature("COFACTOR", 0, 0, ligand="Zn(2+)"),
    }  # fmt: skip
    assert set(old.features) == {
        Feature("SIGNAL", 1, 4), Feature("BINDING", 3, 3, ligand="Zinc"), Feature("DOMAIN", 2, 4, note="EGF-like 1"),
        Feature("DOMAIN", 6, 8),
    }  # fmt: skip
    labels = find_concepts([new, old], "strict", 1)
    assert [row[:3] for row in where(labels, "Domain [FT]: EGF-like")] == [(0, 1, 4), (1, 1, 4)]
    assert tidy("Iron-sulfur (4Fe-4S) (By similarity).") == "Iron-sulfur (4Fe-4S)"


@pytest.mark.parametrize(
    ("text", "words"),
    [("hello\n", "neither a UniProt table"), ("Entry\tLength\nP1\t3\n", "no column Entry or Sequence")],
)
def test_other_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        list(read_entries(path))
    with pytest.raises(UserError, match="no such file"):
        list(read_entries(tmp_path / "absent"))
