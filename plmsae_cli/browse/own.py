"""A sequence somebody pastes: its strongest latents, residue by residue."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.plm.alphabet import LETTERS

if TYPE_CHECKING:
    from plmsae_cli.browse.encoder import Encoder

LONGEST = 2048
SHOWN = 40
"""Latents of the sequence."""
SHOWN_AT = 12
"""Latents of a residue."""


def clean(text: str) -> str:
    """The residues of pasted text: its first FASTA record, or all of it; spaces, numbers and a final * left out.

    Raises:
        UserError: nothing is left, a letter is no residue, or it is too long.
    """
    lines = text.strip().splitlines()
    if lines and lines[0].startswith(">"):
        following = next((i for i, line in enumerate(lines[1:], 1) if line.startswith(">")), len(lines))
        lines = lines[1:following]
    sequence = "".join(c for c in "".join(lines).upper() if not (c.isspace() or c.isdigit())).removesuffix("*")
    if not sequence:
        raise UserError("there is no sequence", "paste amino acids, or one FASTA record")
    for place, letter in enumerate(sequence, 1):
        if letter not in LETTERS:
            raise UserError(f"residue {place} is {letter!r}, which is no amino acid", "paste a protein sequence")
    if len(sequence) > LONGEST:
        raise UserError(f"{len(sequence):,} residues are too many", f"paste at most {LONGEST:,}")
    return sequence


class OwnSequences:
    """Reads sequences; a dictionary and its model are opened at the first."""

    def __init__(self, runs: Sequence[Path]) -> None:
        self._runs = runs
        self._open: dict[int, Encoder] = {}
        self._opening = threading.Lock()

    def read(self, run: int, text: str) -> dict[str, Any]:
        """`sequence`; `active`, the number of latents active in it; `latents`, the strongest of them by share of their
        maximum, each with `at` (from 1) and `activations`; `residues`, of each the strongest latents there: number,
        activation and share."""
        from plmsae_cli.browse.encoder import Encoder

        sequence = clean(text)
        if not 0 <= run < len(self._runs):
            raise UserError(f"there is no dictionary {run}")
        with self._opening:
            if run not in self._open:
                self._open[run] = Encoder(self._runs[run])
        encoder = self._open[run]
        latents = encoder.latents([sequence])
        row_P, slot_P = (latents.acts_BK > 0).nonzero(as_tuple=True)
        index_P, act_P = latents.indices_BK[row_P, slot_P], latents.acts_BK[row_P, slot_P]
        maximum_P = encoder.maximum_N[index_P]
        share_P = (act_P / maximum_P).where(maximum_P > 0, 0.0)
        found: dict[int, dict[str, Any]] = {}
        residues: list[list[tuple[int, float, float]]] = [[] for _ in sequence]
        columns = (column.tolist() for column in (row_P, index_P, act_P, share_P, maximum_P))
        for row, latent, act, share, maximum in zip(*columns, strict=True):
            residues[row].append((latent, act, share))
            one = found.setdefault(
                latent, {"latent": latent, "share": 0.0, "maximum": maximum, "at": [], "activations": []}
            )
            one["share"] = max(one["share"], share)
            one["at"].append(row + 1)
            one["activations"].append(act)
        rows = sorted(found.values(), key=lambda one: (-one["share"], one["latent"]))
        residues = [sorted(here, key=lambda one: (-one[2], one[0]))[:SHOWN_AT] for here in residues]
        return {"sequence": sequence, "active": len(rows), "latents": rows[:SHOWN], "residues": residues}
