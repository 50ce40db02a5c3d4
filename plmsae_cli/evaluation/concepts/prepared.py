"""The proteins, halves and labels of a concept test, made once and read by all of its tasks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.evaluation import Concepts
from plmsae_cli.evaluation.annotations.entries import read_entries
from plmsae_cli.evaluation.clusters import SHOWN, choose_method, cluster, halves
from plmsae_cli.evaluation.concepts.labelling import Labelled, totals
from plmsae_cli.evaluation.concepts.vocabulary import Concept, Labels, amino_acid_concepts, find_concepts
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.evaluation.proteins import choose
from plmsae_cli.store.fs import FileRecord

AXIS = "concepts"
_RANGES = ("protein", "concept", "start", "stop", "instance")


@dataclass(frozen=True)
class Prepared:
    """P proteins, C concepts (the last 20 are the amino acids)."""

    labelled: Labelled
    concepts: tuple[Concept, ...]
    test_P: npt.NDArray[np.bool_]
    total_CH: npt.NDArray[np.int64]
    """What recall divides by, of validation and test: residues, or instances."""
    positive_CH: npt.NDArray[np.int64]
    """Residues."""
    facts: dict[str, Any]

    def half(self, half: int) -> list[int]:
        """Proteins of validation (0) or test (1)."""
        found: list[int] = np.flatnonzero(self.test_P == bool(half)).tolist()
        return found


def prepare(scope: Scope, options: Concepts) -> list[FileRecord]:
    """Read the annotations and fix proteins, halves and concepts.

    Raises:
        UserError: no protein is left, nothing is known of any, or no concept is frequent enough.
    """
    strict = options.mode == "strict"
    path = scope.store.local(options.annotations)
    chosen = choose(read_entries(path), scope.store, scope.dataset, options.max_length, leave_out=strict)
    sequences = [entry.sequence for entry in chosen.entries]
    if not any(entry.features for entry in chosen.entries):
        raise UserError(
            f"nothing is known of the residues of the {len(sequences):,} proteins of {options.annotations}",
            "a table needs columns of features (ft_domain or Domain [FT], ft_binding, ...): ask UniProt for them",
        )
    split = options.split if options.split != "auto" else ("cluster" if strict else "random")
    if split == "cluster":
        method = choose_method(options.clusters)
        cluster_P, by = cluster(sequences, method), SHOWN[method]
    else:
        cluster_P, by = np.arange(len(sequences)), "protein"
    lengths_P = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    test_P = halves(cluster_P, chosen.hashes_P, lengths_P)
    found = find_concepts(chosen.entries, options.mode, options.min_instances)
    labels, total_CH, positive_CH = keep(found, sequences, chosen.hashes_P, test_P, options)
    facts = {
        "mode": options.mode,
        "split": by,
        "clusters": len(np.unique(cluster_P)),
        "proteins": {**chosen.tally, "validation": int((~test_P).sum()), "test": int(test_P.sum())},
        "residues": {"validation": int(lengths_P[~test_P].sum()), "test": int(lengths_P[test_P].sum())},
        "cofactors_without_place": found.without_place,
        "concepts": [asdict(concept) for concept in labels.concepts],
        "totals": total_CH.tolist(),
        "positives": positive_CH.tolist(),
    }
    ranges = (labels.protein_M, labels.concept_M, labels.start_M, labels.stop_M, labels.instance_M)
    return [
        scope.write_table(AXIS, "labels.parquet", dict(zip(_RANGES, ranges, strict=True))),
        scope.write_table(
            AXIS,
            "chosen.parquet",
            {
                "id": [entry.accession for entry in chosen.entries],
                "sequence": sequences,
                "hash": chosen.hashes_P,
                "in_training": chosen.trained_P,
                "test": test_P,
                "cluster": cluster_P,
            },
        ),
        scope.write_json(AXIS, "prepared.json", facts),
    ]


def keep(
    found: Labels,
    sequences: list[str],
    hashes_P: npt.NDArray[np.uint64],
    test_P: npt.NDArray[np.bool_],
    options: Concepts,
) -> tuple[Labels, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The concepts frequent enough and present in both halves, with recall's totals [C, 2] and residues [C, 2].

    Enough is more than `keep_instances` instances, or more than `keep_residues` residues, in both halves together.
    """
    labelled = Labelled(found, sequences, hashes_P, amino_acids=True)
    sides = [totals(labelled, np.flatnonzero(test_P == half).tolist()) for half in (False, True)]
    positive_CH = np.stack([side[0] for side in sides], 1)
    instance_CH = np.stack([side[1] for side in sides], 1)
    count = len(found.concepts)
    enough_C = (instance_CH.sum(1) > options.keep_instances) | (positive_CH.sum(1) > options.keep_residues)
    enough_C &= (positive_CH > 0).all(1)
    if not count:
        raise UserError(
            f"no annotation occurs {options.min_instances} times in the {len(sequences):,} proteins",
            "lower eval.concepts.min_instances, or name more proteins",
        )
    if not enough_C[:count].any():
        raise UserError(
            f"none of {count} concepts has more than {options.keep_instances} instances or {options.keep_residues} residues,"
            " and some in both halves",
            "lower eval.concepts.keep_instances and min_instances, or name more proteins",
        )
    enough_C[count:] = True  # amino acids stay, so that there are always 20
    place_C = np.cumsum(enough_C) - 1
    inside_M = enough_C[found.concept_M]
    labels = Labels(
        tuple(concept for concept, kept in zip(found.concepts, enough_C, strict=False) if kept),
        found.protein_M[inside_M],
        place_C[found.concept_M[inside_M]],
        found.start_M[inside_M],
        found.stop_M[inside_M],
        found.instance_M[inside_M],
        found.without_place,
    )
    by_residue_C = np.array([c.by_residue for c in found.concepts] + [True] * (len(enough_C) - count))
    total_CH = np.where(by_residue_C[:, None], positive_CH, instance_CH)
    return labels, total_CH[enough_C], positive_CH[enough_C]


def load(scope: Scope) -> Prepared:
    """What `prepare` left."""
    facts = scope.read_json(AXIS, "prepared.json")
    chosen, ranges = scope.read_table(AXIS, "chosen.parquet"), scope.read_table(AXIS, "labels.parquet")
    concepts = tuple(Concept(**one) for one in facts["concepts"])
    labels = Labels(concepts, *(ranges[name].to_numpy() for name in _RANGES))
    labelled = Labelled(labels, chosen["sequence"].to_pylist(), chosen["hash"].to_numpy(), amino_acids=True)
    return Prepared(
        labelled,
        (*concepts, *amino_acid_concepts()),
        chosen["test"].to_numpy(zero_copy_only=False),
        np.array(facts["totals"], dtype=np.int64),
        np.array(facts["positives"], dtype=np.int64),
        facts,
    )
