"""Which rows are read: one side of the split, in the order of proteins. Reads manifests alone, so that a dry run can ask."""

from __future__ import annotations

from dataclasses import dataclass

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.store.manifest import read_manifest


@dataclass(frozen=True)
class Where:
    """The side of the split that is read, known before anything is on disk."""

    folder: str
    heldout: bool
    rows: int
    """As planned, until the folder is finished."""


def where(scope: Scope, split: str) -> Where:
    """The folder with the rows in the order of proteins.

    Raises:
        UserError: the training rows were given up, or are not this experiment's.
    """
    if split == "heldout":
        rows = scope.manifest["heldout_rows"] if scope.manifest else scope.lineage.scan.num_heldout_rows
        return Where(scope.dataset, True, rows)
    remedy = "set eval.features.split: heldout, whose rows are in the dataset itself"
    train = scope.experiment.train
    if scope.experiment.embed is None or (train is not None and train.data is not None):
        raise UserError(
            f"eval.features reads training activations in the order of proteins, and {scope.dataset} has shuffled ones",
            f"{remedy}, or add the sections that made the dataset in place of train.data",
        )
    folder = scope.lineage.activations(scope.experiment.training_layer()).folder
    manifest = read_manifest(scope.store, folder)
    if manifest is None:
        if scope.manifest is not None:
            raise UserError(
                f"eval.features reads the activations in {folder}, which are no longer there",
                f"{remedy}, or make them again: `plmsae embed`",
            )
        return Where(folder, False, _planned_rows(scope))
    rows = manifest.get("ordered_rows", manifest["rows"])
    if not rows:
        raise UserError(f"{folder} has no rows in the order of proteins", f"raise embed.ordered_rows, or {remedy}")
    return Where(folder, False, rows)


def unknown_sequences() -> UserError:
    """Where clusters or stretches of proteins are wanted whose letters nobody has."""
    return UserError(
        "eval.features.one_per: cluster and describe need sequences, and those of the imported activations are not known",
        "add embed.fasta, or set one_per: protein and remove describe",
    )


def _planned_rows(scope: Scope) -> int:
    embed = scope.experiment.embed
    assert embed is not None
    rows = scope.lineage.scan.num_rows
    return min(rows, embed.ordered_rows) if embed.layout == "bucketed" else rows
