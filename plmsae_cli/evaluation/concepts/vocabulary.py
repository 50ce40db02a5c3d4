"""From feature tables to concepts: which residues of which protein carry which label.

A concept is a kind of feature with a label (`Domain [FT]: SH3`), or with any (`Domain [FT]: any`), after the concept test of
InterPLM (Simon and Zou 2024). An instance of it is one feature.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from plmsae_cli.evaluation.annotations.entries import Entry, Feature
from plmsae_cli.plm.alphabet import AMINO_ACIDS

Mode = Literal["strict", "interplm_compat"]


@dataclass(frozen=True)
class Kind:
    """One kind of annotation."""

    name: str
    key: str
    label: Literal["note", "ligand", "none"]
    """Where its label is; `none`: the kind is one concept."""
    by_residue: bool = False
    """Whether recall counts residues, as for kinds that mark single residues, rather than instances."""


KINDS = (
    Kind("Active site", "ACT_SITE", "note", True),
    Kind("Binding site", "BINDING", "ligand"),
    Kind("Cofactor", "COFACTOR", "ligand", True),
    Kind("Glycosylation", "CARBOHYD", "note", True),
    Kind("Modified residue", "MOD_RES", "note", True),
    Kind("Transit peptide", "TRANSIT", "note"),
    Kind("Signal peptide", "SIGNAL", "none"),
    Kind("Compositional bias", "COMPBIAS", "note"),
    Kind("Domain [FT]", "DOMAIN", "note"),
    Kind("Region", "REGION", "note"),
    Kind("Motif", "MOTIF", "note"),
    Kind("Zinc finger", "ZN_FING", "note"),
    Kind("Topological domain", "TOPO_DOM", "note"),
    Kind("Transmembrane", "TRANSMEM", "note"),
    Kind("Helix", "HELIX", "none"),
    Kind("Turn", "TURN", "none"),
    Kind("Beta strand", "STRAND", "none"),
    Kind("Coiled coil", "COILED", "none"),
    Kind("Lipidation", "LIPID", "none"),
    Kind("Disulfide bond", "DISULFID", "none", True),
)
_BY_KEY = {kind.key: kind for kind in KINDS}
_NUMBERED = re.compile(r"\s+\d+$")
_WITHOUT_ANY = ("Region", "Modified residue", "Compositional bias", "Motif")
"""Kinds whose `any` the reference leaves out of its scores."""
_NEWER = ("Topological domain", "Transmembrane")
"""Kinds the reference does not look at."""


@dataclass(frozen=True)
class Concept:
    """What is looked for."""

    name: str
    kind: str
    by_residue: bool
    amino_acid: bool = False


@dataclass(frozen=True)
class Labels:
    """Where the concepts are. Letters: M ranges.

    A range is residues [start, stop) (from 0) of a protein; ranges of one instance share its number: the two ends of a
    disulfide bond are one.
    """

    concepts: tuple[Concept, ...]
    protein_M: npt.NDArray[np.int64]
    concept_M: npt.NDArray[np.int64]
    start_M: npt.NDArray[np.int64]
    stop_M: npt.NDArray[np.int64]
    instance_M: npt.NDArray[np.int64]
    without_place: int = 0
    """Cofactors for which the entry names no binding residue."""


def label_of(kind: Kind, feature: Feature, mode: Mode) -> str | None:
    """The label of a feature; None where it has none.

    Both modes cut at the first semicolon (`Phosphoserine; by PKA`). `strict` looks where each kind keeps its label and
    takes numbered repeats (`EGF-like 1`, `EGF-like 2`) as one; `interplm_compat` reads the note alone, as the reference
    does, so that binding sites, cofactors and signal peptides are never labelled.
    """
    text = feature.ligand if kind.label == "ligand" and mode == "strict" else feature.note
    label = text.partition(";")[0].strip()
    if mode == "strict" and kind.label == "note":
        label = _NUMBERED.sub("", label)
    return label or None


def find_concepts(entries: Sequence[Entry], mode: Mode, min_instances: int) -> Labels:
    """All concepts of the proteins.

    A label with fewer than `min_instances` instances is none. Kinds with labels have `any` besides: in `strict` every
    feature of the kind is one, in `interplm_compat` those whose label is a concept. A cofactor has no place of its own: its
    residues are those of the protein's binding sites of the same ligand. Positions beyond the sequence are cut off.
    """
    found: list[list[tuple[Kind, str | None, list[tuple[int, int]]]]] = []
    without_place = 0
    for entry in entries:
        mine = []
        for feature in entry.features:
            kind = _BY_KEY.get(feature.key)
            if kind is None or (
                mode == "interplm_compat" and (kind.name in _NEWER or kind.key in ("COFACTOR", "SIGNAL"))
            ):
                continue
            places = _places(entry, feature)
            if not places:
                without_place += feature.key == "COFACTOR"
                continue
            mine.append((kind, label_of(kind, feature, mode) if kind.label != "none" else None, places))
        found.append(_distinct(mine) if mode == "strict" else mine)
    counted = Counter((kind.name, label) for mine in found for kind, label, _ in mine if label is not None)
    counted_any = Counter(kind.name for mine in found for kind, _, _ in mine)
    kept = {pair for pair, count in counted.items() if count >= min_instances}
    concepts: dict[tuple[str, str | None], Concept] = {}
    for kind in KINDS:
        if kind.label != "none":
            for text in sorted(label for name, label in kept if name == kind.name):
                concepts[kind.name, text] = Concept(f"{kind.name}: {text}", kind.name, kind.by_residue)
        if mode == "interplm_compat" and (
            kind.name in _WITHOUT_ANY or (kind.label != "none" and not any(name == kind.name for name, _ in kept))
        ):
            continue
        if counted_any[kind.name] >= min_instances:
            title = kind.name if kind.label == "none" else f"{kind.name}: any"
            concepts[kind.name, None] = Concept(title, kind.name, kind.by_residue)
    number = {key: index for index, key in enumerate(concepts)}
    rows: list[tuple[int, int, int, int, int]] = []
    instance = 0
    for protein, mine in enumerate(found):
        for kind, label, places in mine:
            keys: list[tuple[str, str | None]] = [(kind.name, label)] if label is not None else []
            if kind.label == "none" or mode == "strict" or (kind.name, label) in kept:
                keys.append((kind.name, None))
            for key in keys:
                if key in number:
                    rows += [(protein, number[key], start - 1, end, instance) for start, end in places]
                    instance += 1
    table = np.array(rows, dtype=np.int64).reshape(-1, 5)
    protein_M, concept_M, start_M, stop_M, instance_M = (table[:, column].copy() for column in range(5))
    return Labels(tuple(concepts.values()), protein_M, concept_M, start_M, stop_M, instance_M, without_place)


def _places(entry: Entry, feature: Feature) -> list[tuple[int, int]]:
    """Ranges of residues (from 1, inclusive) that the feature marks."""
    if feature.key == "COFACTOR":
        same = (f for f in entry.features if f.key == "BINDING" and f.ligand == feature.ligand)
        ranges = [(f.start, f.end) for f in same]
    elif feature.key == "DISULFID":
        ranges = [(place, place) for place in dict.fromkeys((feature.start, feature.end))]
    else:
        ranges = [(feature.start, feature.end)]
    length = len(entry.sequence)
    return [(start, min(end, length)) for start, end in ranges if start <= length]


def _distinct(
    mine: list[tuple[Kind, str | None, list[tuple[int, int]]]],
) -> list[tuple[Kind, str | None, list[tuple[int, int]]]]:
    """One of several features that say the same of the same residues (`Phosphoserine; by PKA`, `...; by PKC`)."""
    return list({(kind.name, label, tuple(places)): (kind, label, places) for kind, label, places in mine}.values())


def amino_acid_concepts() -> Iterator[Concept]:
    """The 20 amino acids as concepts, reported apart: a residue's letter is the model's input."""
    for letter in AMINO_ACIDS:
        yield Concept(f"Amino acid: {letter}", "Amino acid", True, amino_acid=True)
