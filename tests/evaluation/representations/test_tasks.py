"""Labels from annotations and tables, and splits that no cluster straddles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.annotations.entries import Entry, Feature, read_entries
from plmsae_cli.evaluation.representations.tasks import (
    Labelled,
    localisation,
    named_task,
    prepare,
    secondary_structure,
    table_task,
    transmembrane,
)  # fmt: skip
from plmsae_cli.plm.alphabet import AMINO_ACIDS


def entry(*features: tuple[str, int, int], location: str = "") -> Entry:
    return Entry("P1", "M" * 12, tuple(Feature(*feature) for feature in features), location=location)


def test_labels_by_residue() -> None:
    both = entry(("HELIX", 3, 5), ("STRAND", 8, 9), ("TURN", 6, 7), ("TRANSMEM", 2, 4))
    assert secondary_structure(both) == "--HHHCCEE---"
    assert transmembrane(both) == "OMMMOOOOOOOO"
    assert secondary_structure(entry(("TURN", 2, 3))) is None
    assert transmembrane(entry(("TRANSMEM", 10, 14))) is None  # beyond the sequence: of another isoform
    assert transmembrane(entry()) is None


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("Cell membrane; Multi-pass membrane protein.", "cell membrane"),
        ("Mitochondrion inner membrane. Nucleus.", "mitochondrion"),
        ("Membrane; Single-pass type I membrane protein.", "membrane"),
        ("Protein storage vacuole (Probable).", "vacuole"),
        ("", None),
        ("Cell junction, synapse.", None),
    ],
)
def test_localisation_is_the_place_named_first(text: str, place: str | None) -> None:
    assert localisation(entry(location=text)) == place


def test_tables_have_locations_too(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    text = "SUBCELLULAR LOCATION: Nucleus {ECO:0000269}. Note=Also in the cytoplasm."
    path.write_text(f"Entry\tSequence\tSubcellular location [CC]\nP1\tMKV\t{text}\n")
    assert named_task("localisation", read_entries(path)).labels == ["nucleus"]


def test_tables_of_users(tmp_path: Path) -> None:
    def read(text: str, name: str = "t.csv") -> Labelled:
        (tmp_path / name).write_text(text)
        return table_task(tmp_path / name, name)

    words = read("id,sequence,label\n1,mkv,yes\n2,MKL,no\n")
    assert (words.sequences, words.labels, words.regression) == (["MKV", "MKL"], ["yes", "no"], False)
    assert read("sequence\tlabel\nMK\t0.5\nML\t1\n", "t.tsv").regression
    assert not read("sequence,label\nMK,0\nML,1\n").regression
    assert read("sequence,label\n" + "".join(f"MK,{i}\n" for i in range(11))).regression
    assert read("sequence,label,split\nMK,a,train\nML,b,test\n").splits == ["train", "test"]
    assert read("sequence,label\nMK,1\nML,0\nMV,1.0\n").labels == ["1", "0", "1"], "one class, however it is written"
    assert read('sequence,label\nMK,"secreted, soluble"\n').labels == ["secreted, soluble"]
    for text, message in (
        ("sequence,value\nMK,1\n", "no column label"),
        ("sequence,label\nMK,\n", "line 2 has no sequence or no label"),
        ("sequence,label,split\nMK,a,dev\n", "split is 'dev'"),
        ("sequence,label\nMK,0.5\nML,nan\n", "line 3: label is nan"),
        ("sequence,label\nMK,a\nML,  \n", "line 3 has no sequence or no label"),
        ("sequence,label\nMK,a\n\nML,secreted, soluble\n", "line 4 has more fields than the header"),
        ('sequence,label\nMK,a\nML,"b\nMV,c\n', "behind line 2: unexpected end"),
        ("sequence,label\n", "no line behind its header"),
        ("", "no column label and no column sequence"),
    ):
        with pytest.raises(UserError, match=message):
            read(text)
    assert read("\ufeffsequence,label\nMK,a\n").sequences == ["MK"], "as spreadsheets write it"
    with pytest.raises(UserError, match="no such file"):
        table_task(tmp_path / "absent.csv", "absent.csv")
    (tmp_path / "latin.csv").write_bytes(b"sequence,label\nMK,\xe9\n")
    with pytest.raises(UserError, match="no text in UTF-8"):
        table_task(tmp_path / "latin.csv", "latin.csv")


def random_task(count: int, order: int = 1) -> Labelled:
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list(AMINO_ACIDS), 30)) for _ in range(count)]
    sequences += [s[:-1] + "W" for s in sequences[: count // 2]]  # close relatives
    labels = ["ab"[i % 2] for i in range(len(sequences))]
    return Labelled("t", "protein", False, sequences[::order], labels[::order], [])


@pytest.mark.parametrize("clusters", ["kmer", "hash"])
def test_splits_are_a_function_of_the_sequences(clusters: str) -> None:
    found, _ = prepare(random_task(200), 100, None, 100, 2, clusters)
    again, _ = prepare(random_task(200, -1), 100, None, 100, 2, clusters)
    sides = dict(zip(found.sequences, found.splits, strict=True))
    assert sides == dict(zip(again.sequences, again.splits, strict=True))
    shares = [found.splits.count(split) / len(found.splits) for split in ("train", "valid", "test")]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.02)
    if clusters == "kmer":  # relatives are on one side
        assert all(sides[s] == sides[s[:-1] + "W"] for s in random_task(200).sequences[:100])


def test_samples_and_classes() -> None:
    task = random_task(40)
    assert len(prepare(task, 100, 30, 100, 2, "hash")[0].sequences) == 30
    assert (
        prepare(task, 100, 30, 100, 2, "hash")[0].sequences
        == prepare(task, 100, None, 100, 2, "hash")[0].sequences[:30]
    )
    rare = Labelled("t", "protein", False, task.sequences, [*task.labels[:-1], "rare"], [])
    assert "rare" not in prepare(rare, 100, None, 100, 2, "hash")[0].labels
    few = Labelled("t", "protein", False, task.sequences, [*task.labels[:-2], "few", "few"], [])
    assert prepare(few, 100, None, 100, 2, "hash")[0].labels.count("few") == 2, "as many as min_proteins are enough"
    again = Labelled("t", "protein", False, [*task.sequences, task.sequences[0]], [*task.labels, "again"], [])
    assert prepare(again, 100, None, 100, 1, "hash") == prepare(task, 100, None, 100, 1, "hash"), "the first of equals"
    with pytest.raises(UserError, match="fewer than two different labels"):
        prepare(
            Labelled("t", "protein", False, task.sequences, ["a"] * len(task.sequences), []), 100, None, 9, 1, "hash"
        )
