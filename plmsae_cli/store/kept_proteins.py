"""The proteins that a scan keeps, read from the file as the model sees them: all of them, or a sample of the training side.

P: kept proteins, in FASTA order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.fasta import Entry, entries
from plmsae_cli.store.fasta_index import KNOWN_LETTERS, fasta_index
from plmsae_cli.store.permutation import counter_hash
from plmsae_cli.store.scan import Policies, Scan, most_rows

_TO_X = {ord(letter): "X" for letter in map(chr, range(33, 127)) if letter not in KNOWN_LETTERS}
_SAMPLE_SEED = 1
"""Of the keyed hash that samples training proteins: another order than that of the split."""


@dataclass(frozen=True)
class Protein:
    """A kept protein."""

    id: str
    description: str
    length: int
    """Residues in the file."""
    sequence: str
    """As embedded."""


def as_embedded(sequence: str, max_length: int | None) -> str:
    """An upper-case sequence with letters outside the alphabet read as X, cut after `max_length` residues."""
    return sequence[:max_length].translate(_TO_X)


def kept_proteins(path: Path, scanned: Scan, options: Policies) -> Iterator[Protein]:
    """The kept proteins in order, streamed. A file that no longer fits its scan is a UserError."""
    changed = UserError(f"{path} changed since it was scanned", "start again: the new file is a new input")
    kept = 0
    record = -1
    for record, entry in enumerate(entries(path)):
        if record >= len(scanned.kept_R):
            raise changed
        if not scanned.kept_R[record]:
            continue
        protein = _protein(entry, options)
        if len(protein.sequence) != scanned.lengths_P[kept]:
            raise changed
        kept += 1
        yield protein
    if record + 1 != len(scanned.kept_R):
        raise changed


def sampled_proteins(path: Path, scanned: Scan, options: Policies, rows: int, batch_rows: int) -> Iterator[list[str]]:
    """Training proteins as embedded, those with the smallest keyed hashes, of `rows` rows or just above, or all.

    In FASTA order, in lists of `batch_rows` rows or just above. The same for any order of the file's records but for that.
    """
    hashes_P = fasta_index(path).hashes_R[scanned.kept_R]
    keyed_P = counter_hash(_SAMPLE_SEED, hashes_P)
    order_P = np.argsort(keyed_P, kind="stable")
    order_P = order_P[~scanned.heldout_P[order_P]]
    before_P = np.cumsum(scanned.lengths_P[order_P], dtype=np.int64) - scanned.lengths_P[order_P]
    chosen_P = np.zeros(scanned.num_proteins, bool)
    chosen_P[order_P[before_P < rows]] = True
    batch: list[str] = []
    held = 0
    for chosen, protein in zip(chosen_P, kept_proteins(path, scanned, options), strict=True):
        if not chosen:
            continue
        batch.append(protein.sequence)
        held += len(protein.sequence)
        if held >= batch_rows:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _protein(entry: Entry, options: Policies) -> Protein:
    identifier, description, sequence, _ = entry
    return Protein(identifier, description, len(sequence), as_embedded(sequence, most_rows(options)))
