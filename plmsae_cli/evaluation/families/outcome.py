"""The last task of the families: every latent matched with the classes, the same with labels permuted, and the tables.

Letters: n latents of a tile, N latents, P proteins, L classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plmsae_cli.config.evaluation import Families
from plmsae_cli.evaluation.families.largest import Reader
from plmsae_cli.evaluation.families.matching import Match, intervals, match, tile_latents
from plmsae_cli.evaluation.families.patterns import PATTERNS, Patterns
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.evaluation.protein_labels import classes
from plmsae_cli.runtime.device import pick_device
from plmsae_cli.runtime.task import Context
from plmsae_cli.store.fs import FileRecord, join
from plmsae_cli.store.tensorfile import TensorFile

AXIS = "families"
SPECIFIC = 0.7
"""F1 above which a latent is family-specific."""
FOUND = 0.5
"""F1 above which a class counts as found by its latent."""
LISTED = 100
"""Latents shown with their families, those that fit best on train."""
BARS = 20
SEED = 0
"""Of the permutation of labels, and of the draws for intervals."""


@dataclass(frozen=True)
class Outcome:
    """What all latents mark, on the CPU."""

    classes: Sequence[str]
    ours: Match
    permuted: Match
    """The same with labels permuted."""
    pattern_N: Tensor
    """Place in PATTERNS."""
    proteins_L: Sequence[int]
    """Proteins of each class."""
    chance_L: Sequence[float]
    """F1 of marking every test protein."""
    tested: int
    """Proteins that score."""

    def result(self) -> dict[str, Any]:
        """Figures and the latents that people read."""
        fits = [n for n, c in enumerate(self.ours.class_N.tolist()) if c >= 0]
        fits.sort(key=lambda n: -float(self.ours.f1_train_N[n]))
        of_class, of_class_permuted = _of_classes(self.ours), _of_classes(self.permuted)
        specific_N = _scored(self.ours) > SPECIFIC
        return {
            "classes": len(self.classes),
            "found": int((self.ours.f1_N[of_class] > FOUND).sum()),
            "found_permuted": int((self.permuted.f1_N[of_class_permuted] > FOUND).sum()),
            "specific": int(specific_N.sum()),
            "specific_families": len(set(self.ours.class_N[specific_N].tolist())),
            "specific_permuted": int((_scored(self.permuted) > SPECIFIC).sum()),
            "patterns": {name: int((self.pattern_N == i).sum()) for i, name in enumerate(PATTERNS)},
            "histogram": _histogram(self.ours),
            "histogram_permuted": _histogram(self.permuted),
            "best": self._rows(fits[:LISTED]),
            "by_class": sorted(self._rows(of_class), key=lambda row: -row["f1"]),
        }

    def _rows(self, latents: Sequence[int]) -> list[dict[str, Any]]:
        ends = intervals(vars(self.ours), latents, self.tested, SEED)
        return [self._row(n) | {"interval_f1": interval} for n, interval in zip(latents, ends, strict=True)]

    def _row(self, n: int) -> dict[str, Any]:
        number, ours = int(self.ours.class_N[n]), vars(self.ours)
        return {
            "latent": n,
            "family": self.classes[number],
            "proteins": self.proteins_L[number],
            "pattern": PATTERNS[int(self.pattern_N[n])],
            **{key: float(ours[f"{key}_N"][n]) for key in ("threshold", "f1_train", "precision", "recall", "f1")},
            "chance": self.chance_L[number],
        }

    def latents(self) -> dict[str, list[Any]]:
        """Columns of latents.parquet."""
        class_N = self.ours.class_N.tolist()

        def column(values_N: Tensor) -> list[float | None]:
            return [v if c >= 0 else None for v, c in zip(values_N.tolist(), class_N, strict=True)]

        return {
            "latent": list(range(len(class_N))),
            "pattern": [PATTERNS[p] for p in self.pattern_N.tolist()],
            "family": [self.classes[c] if c >= 0 else None for c in class_N],
            "family_f1": column(self.ours.f1_N),
            "family_f1_train": column(self.ours.f1_train_N),
            "family_precision": column(self.ours.precision_N),
            "family_recall": column(self.ours.recall_N),
            "family_threshold": column(self.ours.threshold_N),
        }


def match_all(scope: Scope, options: Families, names: Sequence[str], context: Context) -> list[FileRecord]:
    """result.json, latents.parquet and proteins.parquet, from what the pieces left: `names` are relative to the run's folder."""
    device = pick_device()
    facts = scope.read_json(AXIS, "prepared.json")
    chosen = scope.read_table(AXIS, "chosen.parquet")
    found, y_PL = classes([set(one) for one in chosen["labels"].to_pylist()], 1)
    assert found == facts["classes"]
    test_P = torch.from_numpy(chosen["test"].to_numpy(zero_copy_only=False).copy()).to(device)
    truth_PL = torch.from_numpy(y_PL).to(device)
    paths = {kind: [join(scope.folder, n) for n in names if f"/{kind}/" in n] for kind in ("activations", "patterns")}
    patterns = _patterns([TensorFile(scope.store, path) for path in paths["patterns"]])
    reader = Reader(scope.store, paths["activations"], len(truth_PL))
    top = options.top if options.mode == "strict" else None
    ours, permuted = _matches(reader, len(patterns.active_N), truth_PL, test_P, top, context)
    share_L = truth_PL[test_P].double().mean(0)
    outcome = Outcome(
        found,
        ours,
        permuted,
        patterns.classes(),
        y_PL.sum(0).tolist(),
        (2 * share_L / (1 + share_L)).tolist(),
        int(test_P.sum()),
    )
    proteins = {
        "id": chosen["id"],
        "length": [len(s) for s in chosen["sequence"].to_pylist()],
        "in_training": chosen["in_training"],
        "families": chosen["labels"],
        "families_half": ["test" if t else "train" for t in test_P.tolist()],
    }
    about = {key: facts[key] for key in ("mode", "split", "clusters", "proteins", "labelled")}
    return [
        scope.write_json(AXIS, "result.json", {**about, **outcome.result()}),
        scope.write_table(AXIS, "latents.parquet", outcome.latents()),
        scope.write_table(AXIS, "proteins.parquet", proteins),
    ]


def _patterns(files: Sequence[TensorFile]) -> Patterns:
    """Those of all pieces."""
    patterns = Patterns(files[0].shape("active_N")[0])
    for file in files:
        for name, value in patterns.state().items():
            value += file.read(name)
    return patterns


def _matches(
    reader: Reader, num_latents: int, truth_PL: Tensor, test_P: Tensor, top: int | None, context: Context
) -> tuple[Match, Match]:
    """Of all latents, a tile at a time; and the same for permuted labels."""
    order_P = torch.randperm(len(truth_PL), generator=torch.Generator().manual_seed(SEED))
    labels = truth_PL, truth_PL[order_P.to(truth_PL.device)]
    tile = tile_latents(len(truth_PL), truth_PL.shape[1], top or 1)
    parts: list[list[Match]] = [[], []]
    for first in range(0, num_latents, tile):
        context.check_stop()
        last = min(first + tile, num_latents)
        acts_nP = reader.tile(first, last).to(truth_PL.device)
        for part, y_PL in zip(parts, labels, strict=True):
            part.append(match(acts_nP, y_PL, test_P, top))
        context.progress(last, num_latents)
    return _joined(parts[0]), _joined(parts[1])


def _joined(parts: Sequence[Match]) -> Match:
    return Match(**{name: torch.cat([vars(part)[name] for part in parts]).cpu() for name in vars(parts[0])})


def _scored(match: Match) -> Tensor:
    """F1 on test; 0 of latents without a class."""
    return torch.where(match.class_N >= 0, match.f1_N, 0.0)


def _of_classes(match: Match) -> list[int]:
    """Of each class that is some latent's, the latent that fits it best on train; the first of equals."""
    best: dict[int, int] = {}
    f1_N = match.f1_train_N.tolist()
    for n, c in enumerate(match.class_N.tolist()):
        if c >= 0 and (c not in best or f1_N[n] > f1_N[best[c]]):
            best[c] = n
    return list(best.values())


def _histogram(match: Match) -> list[int]:
    """Latents with a class, in twenty bins of their F1 on test."""
    values = match.f1_N[match.class_N >= 0]
    counts: list[int] = torch.bincount((values * BARS).long().clamp(0, BARS - 1), minlength=BARS).tolist()
    return counts
