"""Which proteins are folded, and in which order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pyarrow.parquet as pq
import pytest

from plmsae_cli.config.structure import Structure
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.evaluation.structure.proteins import proteins
from plmsae_cli.store.fs import Store
from plmsae_cli.store.proteins import SCHEMA

pytest.importorskip("biotite")


def test_those_of_structures_come_first_each_sequence_once(tmp_path: Path) -> None:
    pq.write_table(SCHEMA.empty_table(), tmp_path / "proteins.parquet")
    atoms = [
        f"ATOM  {n:5d}  CA  {residue} A{n:4d}    {4.0 * n:8.3f}{0:8.3f}{0:8.3f}  1.00  0.00           C"
        for n, residue in enumerate(("TRP", "GLY", "ALA"), 1)
    ]
    (tmp_path / "s.pdb").write_text("\n".join([*atoms, "END", ""]))
    (tmp_path / "p.fasta").write_text(">first\nMKVL\n>same\nWGA\n>last\nCCCC\n")
    scope = cast(Scope, SimpleNamespace(store=Store(), dataset=str(tmp_path)))

    def chosen(**options: object) -> list[str]:
        files = {"structures": [str(tmp_path / "s.pdb")], "fasta": str(tmp_path / "p.fasta")}
        return [one.id for one in proteins(scope, Structure.model_validate({**files, **options}))]

    assert chosen() == ["s_A", "first", "last"]
    assert chosen(proteins=2) == ["s_A", "first"]
    assert chosen(ids=["same", "last"]) == ["s_A", "last"]
