"""An experiment being put together from another tool's settings, with notes on what could not be taken over."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from plmsae_cli.config import nodes
from plmsae_cli.config.credentials import is_secret
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.overrides import apply
from plmsae_cli.config.schema import FILE
from plmsae_cli.config.tree import entries, plain

PUBLISHED = re.compile(r"(esm2_t\d+_\w+_UR50D)$")


def parse(text: str) -> dict[str, Any]:
    """JSON or YAML. Raises UserError for what is neither, or no mapping."""
    try:
        document = json.loads(text)
    except ValueError:
        read = nodes.parse(text, "--from")
        if read.problems:
            raise UserError(f"neither JSON nor YAML: {read.problems[0].message}") from None
        document = read.data
    if not isinstance(document, dict):
        raise UserError("a configuration is a mapping of names to values, this file is none")
    return document


class Draft:
    """Takes settings one by one; what nobody took becomes a note."""

    def __init__(self, tool: str, settings: Mapping[str, Any], comforts: Collection[str] = ()) -> None:
        self._tool = tool
        self._settings = dict(settings)
        self._left = {key: value for key, value in settings.items() if key not in comforts and value is not None}
        self.notes: list[str] = []
        self.fields: dict[str, Any] = {
            "embed.fasta": "proteins.fasta.gz",
            "embed.layers": [1],
            "shuffle": {},
            "optimize": {},
            "eval": {},
        }

    def get(self, key: str, default: Any = None) -> Any:
        """A setting, which then counts as taken."""
        self._left.pop(key, None)
        found = self._settings.get(key)
        return default if found is None else found

    def take(self, key: str, field: str, change: Callable[[Any], Any] = lambda value: value) -> None:
        """Put a setting, if it is there, into a field of ours."""
        if (value := self.get(key)) is not None:
            self.fields[field] = change(value)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def model(self, name: str | None) -> None:
        """The language model: ESM-2 is known by its name, anything else is for the user to choose."""
        if name is None:
            return
        if found := PUBLISHED.search(name):
            self.fields["model.weights"] = found[1]
        else:
            self.note(f"model {name}: not a protein language model that is known here; set model.weights")

    def layer(self, hook: str | None, number: int | None) -> None:
        """The layer, counted by blocks passed, from the name of a hook or a number of a block from 0."""
        before = re.search(r"blocks\.(\d+)\.hook_resid_pre$", hook or "")
        after = re.search(r"(?:blocks\.(\d+)\.hook_resid_post|resid_post_layer_(\d+))$", hook or "")
        if before:
            self.fields["embed.layers"] = [int(before[1])]
        elif after:
            self.fields["embed.layers"] = [int(after[1] or after[2]) + 1]
        elif number is not None:
            self.fields["embed.layers"] = [int(number) + 1]
        if hook is not None and not (before or after):
            self.note(f"hook {hook}: only the residual stream behind a block can be read; check embed.layers")

    def finish(self) -> tuple[str, list[str]]:
        """The YAML and the notes."""
        for key, value in self._left.items():
            shown = "***" if is_secret(key) else plain(value)
            self.note(f"{key}: {shown}: no counterpart")
        data = apply({}, self.fields)
        lines = [f"# yaml-language-server: $schema={FILE}", f"# From a configuration of {self._tool}."]
        if self.notes:
            lines += ["# Not taken over as it was:", *(f"#   {_line(note)}" for note in self.notes)]
        order = [path for path in entries() if "." not in path]
        for section in sorted(data, key=order.index):
            lines += ["", *_yaml(section, data[section], "")]
        return "\n".join(lines) + "\n", self.notes


def share(part: float, whole: float) -> float:
    """A part of a run as a share of it, at most 1, to four figures."""
    return min(1.0, float(f"{part / whole:.4g}")) if whole else 0.0


def _yaml(name: str, value: Any, pad: str) -> list[str]:
    if isinstance(value, dict) and value:
        return [f"{pad}{name}:", *(line for key, item in value.items() for line in _yaml(key, item, f"{pad}  "))]
    note = "    # your proteins" if (name, value) == ("fasta", "proteins.fasta.gz") else ""
    return [f"{pad}{name}: {plain(value)}{note}"]


def _line(text: str) -> str:
    """On one line: a setting may hold anything."""
    return " ".join(text.split())[:200]
