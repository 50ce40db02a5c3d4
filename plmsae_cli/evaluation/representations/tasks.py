"""Labelled proteins: tasks that UniProt's annotations give, and those of a user's tables."""

from __future__ import annotations

import csv
import gzip
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.annotations.entries import Entry, open_text
from plmsae_cli.evaluation.clusters import choose_method, cluster, halves
from plmsae_cli.store.split import split_hash

UNLABELLED = "-"
"""A residue that a task says nothing of."""
FEW = 10
"""Whole numbers of at most so many values are classes, other numbers are regressed."""
SPLITS = ("train", "valid", "test")
PLACES = (
    "secreted", "cytoplasm", "nucleus", "mitochondrion", "endoplasmic reticulum", "golgi", "chloroplast", "plastid", "peroxisome",
    "lysosome", "vacuole", "periplasm", "cell membrane", "cell inner membrane", "cell outer membrane", "membrane",
)  # fmt: skip
"""Words of UniProt's subcellular locations that are classes; a protein is of the one its text names first."""

Of = Literal["residue", "protein"]


@dataclass(frozen=True)
class Labelled:
    """One task: proteins, what is to be told of them, and on which side of the split each is."""

    name: str
    of: Of
    regression: bool
    sequences: list[str]
    labels: list[str]
    """A word or number a protein; of a task by residue a letter a residue, `-` where nothing is known."""
    splits: list[str]
    """`train`, `valid`, `test`; empty before they are cut."""

    def some(self, places: Iterable[int]) -> Labelled:
        chosen = list(places)

        def of(column: list[str]) -> list[str]:
            return [column[p] for p in chosen] if column else []

        return replace(self, sequences=of(self.sequences), labels=of(self.labels), splits=of(self.splits))


def secondary_structure(entry: Entry) -> str | None:
    """H (helix), E (strand), C between the first and the last of them; None for a protein without any."""
    found = [("H" if f.key == "HELIX" else "E", f.start, f.end) for f in entry.features if f.key in ("HELIX", "STRAND")]
    if not found or max(end for _, _, end in found) > len(entry.sequence):
        return None
    first, last = min(start for _, start, _ in found), max(end for _, _, end in found)
    letters = [UNLABELLED] * (first - 1) + ["C"] * (last - first + 1) + [UNLABELLED] * (len(entry.sequence) - last)
    for letter, start, end in found:
        letters[start - 1 : end] = letter * (end - start + 1)
    return "".join(letters)


def transmembrane(entry: Entry) -> str | None:
    """M in the membrane, O outside; None for a protein that never crosses it."""
    found = [(f.start, f.end) for f in entry.features if f.key == "TRANSMEM"]
    if not found or max(end for _, end in found) > len(entry.sequence):
        return None
    letters = ["O"] * len(entry.sequence)
    for start, end in found:
        letters[start - 1 : end] = "M" * (end - start + 1)
    return "".join(letters)


def localisation(entry: Entry) -> str | None:
    """The place of `PLACES` that the text names first; None where it names none."""
    text = entry.location.lower()
    places = [(at, word) for word in PLACES if (at := text.find(word)) >= 0]
    return min(places)[1] if places else None


_NAMED: dict[str, tuple[Of, Callable[[Entry], str | None]]] = {
    "secondary_structure": ("residue", secondary_structure),
    "transmembrane": ("residue", transmembrane),
    "localisation": ("protein", localisation),
}


def named_task(name: str, entries: Iterable[Entry]) -> Labelled:
    """A task that annotations give, of the proteins that have one."""
    of, label = _NAMED[name]
    found = [(entry.sequence, text) for entry in entries if (text := label(entry)) is not None]
    return Labelled(name, of, False, [s for s, _ in found], [t for _, t in found], [])


def table_task(path: Path, name: str) -> Labelled:
    """A table with the columns `sequence` and `label`, and perhaps `split` (train, valid, test) for all.

    Raises:
        UserError: no such file or no text, a column or all lines are missing, a line without a sequence or label or with more
            fields than the header, a number that is none, a split of another name.
    """
    lines = _lines(path)
    found = {column: [row[column].strip() for _, row in lines] for column in lines[0][1]}
    for (number, _), sequence, label in zip(lines, found["sequence"], found["label"], strict=True):
        if not sequence or not label:
            raise UserError(f"{path} line {number} has no sequence or no label", "complete or remove it")
    for (number, _), split in zip(lines, found.get("split", ()), strict=False):
        if split not in SPLITS:
            raise UserError(f"{path} line {number}: split is {split!r}", f"one of: {', '.join(SPLITS)}")
    labels = found["label"]
    numbers = _numbers(labels)
    for (number, _), label, value in zip(lines, labels, numbers or (), strict=False):
        if not math.isfinite(value):
            raise UserError(f"{path} line {number}: label is {label}", "remove the line, or give a number")
    regression = numbers is not None and (len(set(numbers)) > FEW or not all(n.is_integer() for n in numbers))
    if numbers is not None and not regression:
        labels = [str(int(n)) for n in numbers]  # 1 and 1.0 are one class
    sequences = [sequence.upper() for sequence in found["sequence"]]
    return Labelled(name, "protein", regression, sequences, labels, found.get("split", []))


def _lines(path: Path) -> list[tuple[int, dict[str, str]]]:
    """The lines behind a table's header, each with its number in the file; an absent field is empty."""
    lines: list[tuple[int, dict[str, str]]] = []
    try:
        with open_text(path) as file:
            reader = csv.DictReader(file, delimiter="\t" if ".tsv" in path.name else ",", restval="", strict=True)
            columns = set(reader.fieldnames or ())
            for row in reader:
                if None in row:
                    raise UserError(
                        f"{path} line {reader.line_num} has more fields than the header has columns",
                        "put a label that has the separator in it in quotation marks",
                    )
                lines.append((reader.line_num, row))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "relative paths start at the working folder") from None
    except csv.Error as error:
        raise UserError(
            f"{path}, behind line {reader.line_num}: {error}", "look for a quotation mark without its pair"
        ) from error
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged, or no text in UTF-8: {error}", "save it as CSV in UTF-8") from error
    if missing := {"sequence", "label"} - columns:
        raise UserError(
            f"{path} has no column {' and no column '.join(sorted(missing))}",
            "its first line names the columns: sequence,label",
        )
    if not lines:
        raise UserError(f"{path} has no line behind its header", "one protein a line: its sequence and its label")
    return lines


def _numbers(labels: Sequence[str]) -> list[float] | None:
    """The labels as numbers, where all of them are."""
    try:
        return [float(label) for label in labels]
    except ValueError:
        return None


def prepare(
    task: Labelled, max_length: int, proteins: int | None, residues: int, min_proteins: int, clusters: str
) -> tuple[Labelled, str]:
    """The task's sample, each sequence once, with splits (60, 20, 20 % of whole clusters), and how these were cut.

    Raises:
        UserError: too little is left for a split or for two classes.
    """
    first = {s: p for p, s in reversed(list(enumerate(task.sequences))) if 0 < len(s) <= max_length}
    hashes = {place: split_hash(sequence) for sequence, place in first.items()}
    taken = sorted(hashes, key=lambda place: hashes[place])[:proteins]
    if task.of == "residue":
        sizes = np.cumsum([len(task.sequences[place]) for place in taken])
        taken = taken[: int(np.searchsorted(sizes, residues)) + 1]
    elif not task.regression:
        counted = Counter(task.labels[place] for place in taken)
        taken = [place for place in taken if counted[task.labels[place]] >= min_proteins]
    kept = task.some(taken)
    if task.splits:
        how = "the table's own"
    else:
        how, splits = _cut(kept, np.array([hashes[place] for place in taken], dtype=np.uint64), clusters)
        kept = replace(kept, splits=splits)
    _require(kept)
    return kept, how


def _cut(task: Labelled, hashes_P: npt.NDArray[np.uint64], clusters: str) -> tuple[str, list[str]]:
    if clusters == "auto":
        clusters = "mmseqs" if choose_method("auto") == "mmseqs" else "hash"
    method = clusters if clusters == "hash" else choose_method(clusters)
    cluster_P = np.arange(len(task.sequences)) if method == "hash" else cluster(task.sequences, method)
    weights = [len(s) if task.of == "residue" else 1 for s in task.sequences]
    size_P = np.array(weights, dtype=np.int64)
    test_P = halves(cluster_P, hashes_P, size_P, 0.2)
    side_P = np.where(test_P, "test", "train").astype("<U5")
    rest = np.flatnonzero(~test_P)
    side_P[rest[halves(cluster_P[rest], hashes_P[rest], size_P[rest], 0.25)]] = "valid"
    shown = {"mmseqs": "30 % identity clusters (MMseqs2)", "kmer": "5-mer clusters", "hash": "hash of the sequence"}
    return shown[method], [str(side) for side in side_P]


def _require(task: Labelled) -> None:
    told = {split: {label for label, s in zip(task.labels, task.splits, strict=True) if s == split} for split in SPLITS}
    if task.of == "residue":
        told = {split: set("".join(labels)) - {UNLABELLED} for split, labels in told.items()}
    for split in SPLITS:
        if len(told[split]) < 2:
            raise UserError(
                f"eval.representations: {task.name} has {len(task.sequences):,} proteins, and its {split} split fewer than two"
                " different labels",
                "name more proteins, or lower min_proteins",
            )
