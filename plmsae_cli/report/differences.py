"""In what the settings of runs differ: fields that change results apart from those that do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.tree import entries

_INPUTS = (
    "embed.fasta",
    "embed.imported.path",
    "model.weights",
    "train.data",
    "train.imported.path",
    "train.plm.fasta",
    "train.plm.valid",
)
"""Fields that name an input: the input's content is in the run's identity, not its name."""
_OF_THE_RUN = ("name", "root")


class Difference(NamedTuple):
    """One field, and its value in each run; None where a run has no such section."""

    field: str
    values: list[Any]
    science: bool
    """Whether it changes results, or names an input that may."""


def differences(configs: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """Every field in which resolved settings differ, science first, in the order of the tree."""
    flat = [dict(_leaves(config)) for config in configs]
    known = list(entries())
    fields = dict.fromkeys(field for each in flat for field in each if field not in _OF_THE_RUN)
    found = []
    for field in sorted(fields, key=lambda name: known.index(name) if name in known else len(known)):
        values = [each.get(field) for each in flat]
        if any(value != values[0] for value in values):
            found.append(Difference(field, values, is_science(field)))
    return sorted(found, key=lambda each: not each.science)


def is_science(field: str) -> bool:
    """Whether a dotted field is part of what names an artifact or a run."""
    if any(field == name or field.startswith(f"{name}.") for name in _INPUTS):
        return True
    parts = field.split(".")
    section: Any = Experiment
    for depth, name in enumerate(parts):
        info = section.model_fields.get(name) if section is not None else None
        if info is None:
            return depth > 1  # a free key: of its mapping, which was marked or we would not be here
        extra = info.json_schema_extra
        # The sections at the top carry no mark: each names what it makes.
        if depth and not (isinstance(extra, dict) and extra.get("x-science")):
            return False
        section = entries()[".".join(parts[: depth + 1])].section
    return len(parts) > 1


def _leaves(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            found += _leaves(value, f"{path}.")
        elif value is not None:
            found.append((path, value))
    return found
