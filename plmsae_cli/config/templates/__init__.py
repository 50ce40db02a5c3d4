"""Experiments to begin with: the ready ones beside this file, and one with every field of the tree."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.schema import FILE
from plmsae_cli.config.tree import Entry, entries, plain

NAMES = ("sae", "plm", "sweep", "search", "imported")

_WIDTH = 100
# Sections of the other kind of experiment, and those that need files of their own: shown, but commented out.
_OFF = (
    "embed.imported", "train.imported", "train.plm", "sweep", "eval.concepts", "eval.families", "eval.probes",
    "eval.encode", "eval.contacts", "eval.structure", "eval.steering", "eval.features", "eval.lm", "eval.representations",
)  # fmt: skip
_EXAMPLES: dict[str, Any] = {
    "embed.fasta": "proteins.fasta.gz",
    "embed.imported.path": "activations/",
    "embed.layers": [6],
    "train.imported.path": "layer_6/ae.pt",
    "train.plm.fasta": "proteins.fasta.gz",
    "train.plm.speedrun.target_loss": 2.1,
    "sweep.grid": {"train.sae.k": [16, 32, 64]},
    "sweep.random.space": {"train.lr": {"low": 1e-5, "high": 1e-3, "log": True}, "train.sae.k": [16, 32, 64]},
    "sweep.optuna.space": {"train.lr": {"low": 1e-5, "high": 1e-3, "log": True}, "train.sae.k": [16, 32, 64]},
    "eval.concepts.annotations": "uniprot.tsv.gz",
    "eval.families.proteins": "uniprot.tsv.gz",
    "eval.probes.proteins": "uniprot.tsv.gz",
    "eval.encode.fasta": "mine.fasta",
    "eval.contacts.structures": ["1cs4.pdb.gz:A"],
    "eval.structure.fasta": "casp14.fasta.gz",
    "eval.lm.fasta": "proteins.fasta.gz",
    "eval.representations.tasks": ["stability.csv"],
}


def template(name: str) -> str:
    """The text of a ready template, one of `NAMES`. Raises UserError for another name."""
    if name not in NAMES:
        raise UserError(f"no template {name}", f"one of: {', '.join(NAMES)}")
    return (files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")


def full_template() -> str:
    """An experiment with every field at its default and its help above it."""
    head = [
        f"# yaml-language-server: $schema={FILE}",
        "# Every field at its default. What you do not need may go; `null` means that nothing is set.",
    ]
    return "\n".join([*head, *_lines()]) + "\n"


def _lines() -> Iterator[str]:
    for path, entry in entries().items():
        depth = path.count(".")
        off = any(path == top or path.startswith(f"{top}.") for top in _OFF)
        pad = "  " * depth + ("# " if off else "")
        if depth == 0:
            yield ""
        for line in textwrap.wrap(_help(entry), _WIDTH - len(pad) - 2):
            yield f"{pad}# {line}"
        name = path.rpartition(".")[2]
        yield f"{pad}{name}:" if entry.section is not None else f"{pad}{name}: {_value(entry)}"


def _help(entry: Entry) -> str:
    if entry.required:
        return f"{entry.help} (required: {entry.words()})"
    # The default beside a text, a size or a switch already shows what it is.
    telling = any(sign in entry.words() for sign in ("one of", "auto or", "number of", "number above"))
    return f"{entry.help} ({entry.words()})" if telling else entry.help


def _value(entry: Entry) -> str:
    return plain(_EXAMPLES.get(entry.path, entry.default))
