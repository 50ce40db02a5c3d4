"""Labels of whole proteins: families, functions, anything in a table of ids and labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.annotations.entries import open_text


def read_labels(path: Path) -> dict[str, set[str]]:
    """Labels by protein id, of a CSV or TSV, plain or gzip: an id, then a label or several.

    In a TSV labels are separated by `;` or `,` and may fill further columns, in a CSV by `;`; an id may have several lines.
    A line without labels is a protein without any. A header line does no harm: no protein has its first word as id.

    Raises:
        UserError: no such file, or a line that is not a table's.
    """
    found: dict[str, set[str]] = {}
    for name, separator, rest in _lines(path):
        labels = re.split(r"[;,\t]" if separator == "\t" else ";", rest)
        found.setdefault(name.strip(), set()).update(label for part in labels if (label := part.strip().strip('"')))
    return found


def require_labels(path: Path) -> None:
    """Raises UserError as `read_labels` would, and holds nothing: what a plan asks before hours of work."""
    for _ in _lines(path):
        pass


def _lines(path: Path) -> Iterator[tuple[str, str, str]]:
    """Id, separator and the rest of each line."""
    try:
        lines = open_text(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "relative paths start at the working folder") from None
    with lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            name, separator, rest = line.rstrip("\n").partition("\t" if "\t" in line else ",")
            if not separator:
                raise UserError(f"{path} line {number} has no tab and no comma", "write an id and its label a line")
            yield name, separator, rest


def classes(of: Sequence[set[str] | frozenset[str]], least: int) -> tuple[list[str], npt.NDArray[np.bool_]]:
    """The labels of at least `least` proteins, by name, and which protein has which [P, L]."""
    counted = Counter(label for labels in of for label in labels)
    names = sorted(label for label, count in counted.items() if count >= least)
    place = {name: index for index, name in enumerate(names)}
    y_PL = np.zeros((len(of), len(names)), dtype=bool)
    for protein, labels in enumerate(of):
        for label in labels:
            if label in place:
                y_PL[protein, place[label]] = True
    return names, y_PL


def labels_of(accessions: Sequence[str], table: Mapping[str, set[str]]) -> list[set[str]]:
    """The labels of each protein; of one that the table does not have, none."""
    return [table.get(accession, set()) for accession in accessions]
