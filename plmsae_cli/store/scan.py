"""The proteins of an experiment: which are kept, how long, on which side of the split, in which shard.

P: kept proteins, in FASTA order. R: records of the file. Rows are residues as embedded: training rows are
numbered 0..N-1 over the training proteins in FASTA order, held-out rows likewise over theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.fasta import entries
from plmsae_cli.store.fasta_index import KNOWN_LETTERS, FastaIndex, fasta_index
from plmsae_cli.store.split import heldout

Mask = npt.NDArray[np.bool_]
_PIECE = 1 << 16
"""Proteins whose numbers are computed at a time: of millions every array counts."""


class Policies(Protocol):
    """What to do with proteins that are not plain; the `embed` section is one."""

    @property
    def max_length(self) -> int: ...
    @property
    def long(self) -> str: ...
    @property
    def unknown(self) -> str: ...
    @property
    def duplicates(self) -> str: ...
    @property
    def empty(self) -> str: ...
    @property
    def holdout(self) -> float: ...


@dataclass(frozen=True, eq=False)
class Scan:
    """A FASTA file under given policies."""

    sha256: str
    """Of the file as stored."""
    kept_R: Mask
    """Which records of the file are kept."""
    lengths_P: npt.NDArray[np.int32]
    """Residues as embedded, so after truncation (windows leave none out): the protein's rows."""
    truncated_P: Mask
    heldout_P: Mask
    max_length: int
    """Residues of the longest document that the model reads: a longer protein is read in windows of it."""
    row_offset_P: npt.NDArray[np.int64]
    """The protein's first row, in the numbering of its side of the split."""
    counts: Mapping[str, int]
    """For manifests and reports: `proteins` in the file; of these `skipped_empty`, `duplicates`,
    `skipped_unknown` and `skipped_long` (each counted under the first that applies) and `kept`; of the kept
    `truncated`, `windowed` (only under `long: windows`), `residues` (after truncation) and `unknown_letters`
    (before it)."""

    @property
    def num_proteins(self) -> int:
        return len(self.lengths_P)

    @property
    def num_rows(self) -> int:
        """Training rows."""
        return int(self.lengths_P.sum(dtype=np.int64)) - self.num_heldout_rows

    @property
    def num_heldout_rows(self) -> int:
        return int(self.lengths_P[self.heldout_P].sum(dtype=np.int64))

    def rows_before(self, proteins: Sequence[int]) -> list[tuple[int, int]]:
        """For each index p, ascending: training rows, and held-out rows, of the proteins before p.

        With the starts of shards these are the shards' row offsets, also where a shard has no such rows.
        """
        found, before, training, held = [], 0, 0, 0
        for p in proteins:
            assert p >= before, "in ascending order"
            lengths = self.lengths_P[before:p]
            own = int(lengths[self.heldout_P[before:p]].sum(dtype=np.int64))
            training += int(lengths.sum(dtype=np.int64)) - own
            held, before = held + own, p
            found.append((training, held))
        return found

    def shard_ranges(self, rows_per_shard: int) -> list[tuple[int, int]]:
        """Ranges [start, stop) of proteins, one a shard, in order and without gaps.

        There are ceil(rows / rows_per_shard) of them, rows counted on both sides of the split (fewer where
        proteins are longer than shards). They have near equal cost, where a protein of L residues costs
        L + L^2 / 4096 (attention grows with L^2; the second L at most `max_length`): each is within one protein's
        cost of the mean. A shard's
        rows are therefore only about `rows_per_shard`: by the lengths of its proteins up to 25 % more at a
        max_length of 1022.
        """
        num_shards = -(-int(self.lengths_P.sum(dtype=np.int64)) // rows_per_shard)
        total = sum(int(cost_P.sum()) for _, cost_P in self._costs())
        wanted = np.arange(1, num_shards) * (total / num_shards)
        cuts, before = [0, self.num_proteins], 0
        for start, cost_P in self._costs():
            cost_to_P = np.cumsum(np.concatenate(([before], cost_P)))
            here = wanted[(cost_to_P[0] < wanted) & (wanted <= cost_to_P[-1])]
            after = np.searchsorted(cost_to_P, here)
            nearer_before = here - cost_to_P[after - 1] < cost_to_P[after] - here
            cuts += (start + after - nearer_before).tolist()
            before = int(cost_to_P[-1])
        cuts = sorted(set(cuts))
        return list(pairwise(cuts))

    def _costs(self) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Pieces of the proteins: where one starts, and its proteins' costs, in units of 1/4096, so that sums are exact and
        the same on every machine."""
        for start in range(0, self.num_proteins, _PIECE):
            lengths_P = self.lengths_P[start : start + _PIECE].astype(np.int64)
            yield start, lengths_P * (4096 + np.minimum(lengths_P, self.max_length))


def scan(path: Path, options: Policies) -> Scan:
    """Apply the policies to the proteins of a FASTA file: one pass, or none where its index is remembered.

    Raises UserError, naming all that is wrong and the first line of each, where a policy says `error`, where
    no protein is left, and as `fasta.records` does.
    """
    index = fasta_index(path)
    lengths_R = index.lengths_R
    affected: dict[str, Mask] = {
        "empty": lengths_R == 0,
        "duplicates": index.repeats_R,
        "unknown": index.unknown_R > 0,
        "long": lengths_R > options.max_length,
    }
    kept_R = np.ones(len(lengths_R), bool)
    dropped: dict[str, int] = {}
    problems: list[tuple[str, str]] = []
    for policy, mask_R in affected.items():
        choice = getattr(options, policy)
        mask_R = mask_R & kept_R
        dropped[policy] = 0
        if choice == "error" and mask_R.any():
            problems.append(_problem(path, policy, mask_R, options))
        elif choice in ("skip", "first"):
            dropped[policy] = int(mask_R.sum())
            kept_R &= ~mask_R
    if problems:
        raise UserError("\n".join(text for text, _ in problems), "; ".join(hint for _, hint in problems))
    if not kept_R.any():
        left_out = ", ".join(f"{policy} {count:,}" for policy, count in dropped.items() if count)
        raise UserError(f"{path}: none of {len(kept_R):,} proteins is left ({left_out})", "relax these policies")
    return _number(index, kept_R, dropped, options)


def _number(index: FastaIndex, kept_R: Mask, dropped: Mapping[str, int], options: Policies) -> Scan:
    whole = bool(kept_R.all())
    original_P, hashes_P = (
        (index.lengths_R, index.hashes_R) if whole else (index.lengths_R[kept_R], index.hashes_R[kept_R])
    )
    most = most_rows(options)
    lengths_P = original_P if most is None else np.minimum(original_P, np.int32(min(most, 2**31 - 1)))
    heldout_P = heldout(hashes_P, options.holdout)
    row_offset_P = np.zeros(len(lengths_P), np.int64)
    for side in (False, True):
        before = 0
        for start in range(0, len(lengths_P), _PIECE):
            piece = slice(start, start + _PIECE)
            side_P = heldout_P[piece] == side
            ends = before + np.cumsum(lengths_P[piece][side_P], dtype=np.int64)
            row_offset_P[piece][side_P] = ends - lengths_P[piece][side_P]
            before = int(ends[-1]) if len(ends) else before
    truncated_P = original_P > lengths_P
    counts = {
        "proteins": len(kept_R),
        "kept": len(lengths_P),
        "truncated": int(truncated_P.sum()),
        **({"windowed": int((original_P > options.max_length).sum())} if most is None else {}),
        "skipped_long": dropped["long"],
        "unknown_letters": int(index.unknown_R.sum(dtype=np.int64, where=kept_R)),
        "skipped_unknown": dropped["unknown"],
        "duplicates": dropped["duplicates"],
        "skipped_empty": dropped["empty"],
        "residues": int(lengths_P.sum(dtype=np.int64)),
    }
    return Scan(index.sha256, kept_R, lengths_P, truncated_P, heldout_P, options.max_length, row_offset_P, counts)


def most_rows(options: Policies) -> int | None:
    """Residues kept of a protein at most; None where windows keep all."""
    return None if options.long == "windows" else options.max_length


def _problem(path: Path, policy: str, mask_R: Mask, options: Policies) -> tuple[str, str]:
    """Message and hint for the records in `mask_R`, by their first; reads the file up to it once more."""
    first = int(np.argmax(mask_R))
    identifier, _, sequence, line = next(islice(entries(path), first, None))
    others = int(mask_R.sum()) - 1
    more = f" (and {others:,} more)" if others else ""
    explain: dict[str, Callable[[], tuple[str, str]]] = {
        "empty": lambda: (f"protein {identifier} has no residues", "`empty: skip` leaves it out"),
        "duplicates": lambda: (
            f"the id {identifier} was used before, on line {_line_of(path, identifier)}",
            "`duplicates: first` keeps the first of each",
        ),
        "unknown": lambda: (
            f"protein {identifier} has letters outside the alphabet: {_unknown_letters(sequence)}",
            "`unknown: X` reads them as X, `unknown: skip` leaves the protein out",
        ),
        "long": lambda: (
            f"protein {identifier} has {len(sequence):,} residues, max_length is {options.max_length:,}",
            f"`long: truncate` keeps the first {options.max_length:,}, `long: windows` reads it in pieces, `long: skip` "
            "leaves the protein out",
        ),
    }
    text, hint = explain[policy]()
    return f"{path} line {line}: {text}{more}", hint


def _line_of(path: Path, identifier: str) -> int:
    return next(line for name, _, _, line in entries(path) if name == identifier)


def _unknown_letters(sequence: str) -> str:
    return " ".join(sorted(set(sequence) - set(KNOWN_LETTERS)))
