"""The proteins of an axis: which are read, which are left out, and how they are cut into groups."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.proteins import choose, groups, in_training, read_any
from plmsae_cli.store import proteins
from plmsae_cli.store.fs import Store, StoreError
from plmsae_cli.store.proteins import SCHEMA


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """A dataset trained on MKVLA and on the first eight residues of a longer protein."""
    rows = [("a", "MKVLA", "train", False), ("b", "ACDEFGHI", "train", True), ("c", "WWWW", "heldout", False)]
    columns = {
        "id": [r[0] for r in rows], "description": [""] * 3, "length": [5, 12, 4], "rows": [len(r[1]) for r in rows],
        "row_offset": [0, 5, 0], "split": [r[2] for r in rows], "truncated": [r[3] for r in rows],
        "sequence": [r[1] for r in rows],
    }  # fmt: skip
    pq.write_table(pa.table(columns, schema=SCHEMA), tmp_path / "proteins.parquet")
    return str(tmp_path)


FASTA = """\
>sp|P1|ONE_X in training
mkvla
>P2 in training, cut there
ACDEFGHIKLMN
>P3 held out
WWWW
>P4 the same again
WWWW
>P5 long
WWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWW
>P6 new
GGGG
"""


def test_training_proteins_are_counted_and_left_out_in_strict(dataset: str, tmp_path: Path) -> None:
    path = tmp_path / "x.fasta"
    path.write_text(FASTA)
    strict = choose(read_any(path), Store(), dataset, 20, leave_out=True)
    assert [entry.accession for entry in strict.entries] == ["P3", "P6"]
    assert strict.tally == {"read": 6, "long": 1, "repeated": 1, "in_training": 2, "used": 2}
    kept = choose(read_any(path), Store(), dataset, 20, leave_out=False)
    assert [entry.accession for entry in kept.entries] == ["P1", "P2", "P3", "P6"]
    assert kept.trained_P.tolist() == [True, True, False, False]
    known = in_training(Store(), dataset)
    assert [known(text) for text in ("MKVLA", "MKVL", "ACDEFGHI", "ACDEFGH", "WWWW", "")] == [True, False, True] + [
        False
    ] * 3
    with pytest.raises(UserError, match="no protein is left to evaluate on: 6 read, 6 empty or longer than 3"):
        choose(read_any(path), Store(), dataset, 3, leave_out=True)


def test_sequences_of_a_side_are_read_batch_by_batch(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proteins, "_BATCH", 1)
    path = f"{dataset}/proteins.parquet"
    assert list(proteins.sequences_of(Store(), path, "train")) == ["MKVLA", "ACDEFGHI"]
    assert list(proteins.sequences_of(Store(), path, "heldout")) == ["WWWW"]
    Path(path).write_bytes(b"PAR1 not any more PAR1")
    with pytest.raises(StoreError, match="not a sound Parquet file"):
        next(proteins.sequences_of(Store(), path, "train"))


def test_groups_hold_whole_proteins_in_order() -> None:
    assert list(groups([3, 3, 9, 1, 1], 6)) == [[0, 1], [2], [3, 4]]
    assert list(groups([], 6)) == []


def test_an_empty_file_is_named_so(tmp_path: Path) -> None:
    (tmp_path / "x.fasta").touch()
    with pytest.raises(UserError, match=r"x\.fasta is empty"):
        read_any(tmp_path / "x.fasta")
