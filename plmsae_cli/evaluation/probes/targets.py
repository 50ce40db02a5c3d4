"""What probes are asked to tell: kinds of annotation by residue, labels by protein."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plmsae_cli.evaluation.annotations.entries import Entry
from plmsae_cli.evaluation.concepts.vocabulary import find_concepts
from plmsae_cli.evaluation.protein_labels import classes, labels_of


@dataclass(frozen=True)
class Target:
    """A yes or no about rows: all residues, one protein after the other, or proteins."""

    name: str
    of: str
    """`residue` or `protein`."""
    y_R: Tensor


def find_targets(
    entries: Sequence[Entry], labels: Mapping[str, set[str]] | None, test_P: Tensor, least: int
) -> list[Target]:
    """Targets of at least `least` instances (or proteins) that train and test both have with yes and with no, the most
    frequent first.

    Args:
        labels: of proteins by accession; None leaves annotations of residues alone.
        test_P: bool, the proteins that score.
    """
    lengths = [len(entry.sequence) for entry in entries]
    counted = _of_residues(entries, lengths, least)
    if labels is not None:
        names, y_PL = classes(labels_of([entry.accession for entry in entries], labels), least)
        counted += [
            (int(y_PL[:, number].sum()), Target(name, "protein", torch.from_numpy(y_PL[:, number].copy())))
            for number, name in enumerate(names)
        ]
    counted.sort(key=lambda one: -one[0])
    test = {"protein": test_P, "residue": test_P.repeat_interleave(torch.tensor(lengths))}
    return [target for _, target in counted if _told_apart(target.y_R, test[target.of])]


def _of_residues(entries: Sequence[Entry], lengths: Sequence[int], least: int) -> list[tuple[int, Target]]:
    labels = find_concepts(entries, "strict", least)
    offset_P = np.cumsum([0, *lengths])
    counted: list[tuple[int, Target]] = []
    for number, concept in enumerate(labels.concepts):
        if concept.name not in (concept.kind, f"{concept.kind}: any"):
            continue
        y_R = torch.zeros(int(offset_P[-1]), dtype=torch.bool)
        mine = np.flatnonzero(labels.concept_M == number)
        for m in mine:
            first = int(offset_P[labels.protein_M[m]])
            y_R[first + int(labels.start_M[m]) : first + int(labels.stop_M[m])] = True
        counted.append((len(np.unique(labels.instance_M[mine])), Target(concept.kind, "residue", y_R)))
    return counted


def _told_apart(y_R: Tensor, test_R: Tensor) -> bool:
    return all(bool(y.any()) and not bool(y.all()) for y in (y_R[test_R], y_R[~test_R]))
