"""The proteins an axis embeds itself: read, deduplicated, and compared with those the dictionary was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.annotations.entries import Entry, open_bytes, read_entries
from plmsae_cli.store.fasta import records
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.split import split_hash


@dataclass(frozen=True)
class Chosen:
    """The proteins of an axis, and what became of the others."""

    entries: list[Entry]
    hashes_P: npt.NDArray[np.uint64]
    trained_P: npt.NDArray[np.bool_]
    """Whether the dictionary saw the protein in training (false for all, where those were left out)."""
    tally: dict[str, int]
    """`read`, `long`, `repeated`, `in_training`, `used`."""


def read_any(path: Path) -> Iterator[Entry]:
    """Proteins of FASTA, or of a UniProt table or flat file."""
    with open_bytes(path) as file:
        head = file.read(1)
    if head == b">":
        return (Entry(_accession(name), sequence, ()) for name, _, sequence in records(path))
    if not head:
        raise UserError(f"{path} is empty", "name a FASTA, a UniProtKB table or a flat file")
    return read_entries(path)


def require_proteins(path: Path) -> None:
    """Raises UserError where the file cannot be read, or its first protein: what a plan asks before anything is trained."""
    next(read_any(path), None)


def _accession(name: str) -> str:
    """The accession of UniProt's `sp|P12345|NAME_HUMAN`, else the id as it is."""
    parts = name.split("|")
    return parts[1] if len(parts) == 3 and parts[0] in ("sp", "tr") else name


def choose(entries: Iterable[Entry], store: Store, dataset: str, max_length: int, leave_out: bool) -> Chosen:
    """Proteins of at most `max_length` residues, each sequence once, the first of equals.

    With `leave_out` those in training are left out. A protein counts as in training if its sequence, or the part of it that
    was embedded, is a training row of the dataset's `proteins.parquet`.

    Raises:
        UserError: nothing is left.
    """
    trained = in_training(store, dataset)
    seen: set[int] = set()
    kept: list[tuple[Entry, int, bool]] = []
    tally = dict.fromkeys(("read", "long", "repeated", "in_training", "used"), 0)
    for entry in entries:
        tally["read"] += 1
        if not entry.sequence or len(entry.sequence) > max_length:
            tally["long"] += 1
            continue
        mark = split_hash(entry.sequence)
        if mark in seen:
            tally["repeated"] += 1
            continue
        seen.add(mark)
        known = trained(entry.sequence)
        tally["in_training"] += known
        if not (known and leave_out):
            kept.append((entry, mark, known))
    tally["used"] = len(kept)
    if not kept:
        raise UserError(
            f"no protein is left to evaluate on: {tally['read']:,} read, {tally['long']:,} empty or longer than"
            f" {max_length}, {tally['repeated']:,} repeated, {tally['in_training']:,} in training",
            "name other proteins, or raise max_length",
        )
    return Chosen(
        [entry for entry, _, _ in kept],
        np.array([mark for _, mark, _ in kept], dtype=np.uint64),
        np.array([known for _, _, known in kept], dtype=bool),
        tally,
    )


def in_training(store: Store, dataset: str) -> Callable[[str], bool]:
    """Whether a protein's sequence, or the part of it that was embedded, is among the dataset's training proteins."""
    from plmsae_cli.store.proteins import sequences_of  # pulls pyarrow in, which encoding proteins can do without

    longest = 0

    def hashes() -> Iterator[int]:
        nonlocal longest
        for text in sequences_of(store, join(dataset, "proteins.parquet"), "train"):
            longest = max(longest, len(text))
            yield split_hash(text)

    marks_P = np.fromiter(hashes(), dtype=np.uint64)  # 8 bytes a protein: training sets have millions
    marks_P.sort()

    def known(sequence: str) -> bool:
        mark = np.uint64(split_hash(sequence[:longest]))
        place = int(np.searchsorted(marks_P, mark))
        return place < len(marks_P) and bool(marks_P[place] == mark)

    return known


def groups(lengths: Sequence[int], residues: int) -> Iterator[list[int]]:
    """Places of consecutive proteins, together at most `residues` long where one alone is not longer."""
    group: list[int] = []
    used = 0
    for place, length in enumerate(lengths):
        if group and used + length > residues:
            yield group
            group, used = [], 0
        group.append(place)
        used += length
    if group:
        yield group


def piece(lengths: Sequence[int], residues: int, index: int, of: int) -> list[list[int]]:
    """The groups that piece `index` of `of` works on: whole ones, every `of`-th.

    What is computed together has an influence on last bits, so groups are the same ones for any number of pieces.
    """
    return list(groups(lengths, residues))[index::of]
