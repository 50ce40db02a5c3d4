"""The data of one latent's page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plmsae_cli.browse.features import Features, Row
from plmsae_cli.browse.scripts import column

CANDIDATES = 20
RANDOM = 20
"""Random examples of each band that a page has, of those that there are."""
_OWN = (
    "firing", "density", "max", "largest", "mean_active", "band_counts", "histogram", "letters", "deciles", "mean_length",
    "logits", "row_logits", "parent", "parent_share", "description", "description_pearson", "description_spearman",
)  # fmt: skip
_FOUND = (
    "pattern", "family", "family_threshold", "family_f1", "family_precision", "family_recall", "probe_targets", "dead",
    "concept", "concept_f1", "concept_threshold", "steering_kl", "steering_kl_direction", "steering_size", "steering_q",
    "steering_up", "steering_up_effect", "steering_down", "steering_down_effect",
)  # fmt: skip


class Pages:
    """Pages of latents that lie in one file, with the proteins they share."""

    def __init__(self, features: Features, children: dict[int, list[int]], structures: dict[int, str]) -> None:
        """`children`: of a Matryoshka's latents; `structures`: of proteins, the data file with the coordinates."""
        self._features, self._children, self._structures = features, children, structures
        self.latents: list[dict[str, Any]] = []
        self.proteins: dict[int, dict[str, Any]] = {}

    def body(self) -> dict[str, Any]:
        return {"latents": self.latents, "proteins": self.proteins}

    def add(self, latent: int, examples: Sequence[Row], concepts: Sequence[Row]) -> None:
        """The page of the next latent."""
        table, found = self._features.latents, self._features.found
        page: dict[str, Any] = {"latent": latent}
        page |= {key: _short(table[key][latent]) for key in _OWN if key in table and table[key][latent] is not None}
        page |= {
            key: _short(found[key][latent]) for key in _FOUND if key in found and found[key][latent] not in (None, [])
        }
        if targets := page.get("probe_targets"):
            page["probe_targets"] = targets.split("; ")
        for name, pairs in (
            ("neighbours", ("neighbour_cosines",)),
            ("together", ("together_shares", "together_jaccard")),
        ):
            if table.get(name) and table[name][latent]:
                page[name] = list(
                    zip(table[name][latent], *(map(_short, table[key][latent]) for key in pairs), strict=True)
                )
        if effects := self._features.effects.get(latent):
            page["effects"] = {key: _short(value) for key, value in effects.items()}
        if children := self._children.get(latent):
            page["children"] = children
        page["concepts"] = [self._concept(row) for row in concepts]
        page["examples"] = [self._example(row) for row in examples]
        page["along"] = _along(examples)
        page["candidates"] = self._candidates(examples)
        self.latents.append(page)

    def _concept(self, row: Row) -> dict[str, Any]:
        keys = ("concept", "kind", "by_residue", "threshold", "inside", "outside", "found")
        return {key: _short(row[key]) for key in keys}

    def _example(self, row: Row) -> dict[str, Any]:
        self._note(row["protein"])
        return {
            "kind": row["kind"], "band": row["band"], "rank": row["rank"], "protein": row["protein"],
            "position": row["position"], "activation": _short(row["activation"]), "first": row["first"], "last": row["last"],
            "annotated": row["annotated"],
        }  # fmt: skip

    def _candidates(self, examples: Sequence[Row]) -> list[int]:
        """Places, among the examples, of those outside the latent's best concept in annotated proteins, strongest first, one a
        protein."""
        outside = [i for i, row in enumerate(examples) if row["annotated"] is False]
        outside.sort(key=lambda i: (-examples[i]["activation"], examples[i]["row"]))
        first: dict[int, int] = {}
        for i in outside:
            first.setdefault(examples[i]["protein"], i)
        return list(first.values())[:CANDIDATES]

    def _note(self, protein: int) -> None:
        if protein in self.proteins:
            return
        row = self._features.proteins[protein]
        self.proteins[protein] = {key: row[key] for key in ("id", "header", "length", "sequence")}
        if ranges := self._features.annotations.of(protein):
            self.proteins[protein]["ranges"] = ranges
        if protein in self._structures:
            self.proteins[protein]["structure"] = self._structures[protein]


def _along(examples: Sequence[Row]) -> dict[str, Any]:
    """Where in its protein the latent fires beside each example, and how much: `number` of them, then all in one column."""
    at_A = np.concatenate([row["positions"] for row in examples]) if examples else np.empty(0)
    steps_A = np.concatenate([row["steps"] for row in examples]) if examples else at_A
    kind = "u2" if at_A.max(initial=0) < 1 << 16 else "u4"
    number = [len(row["positions"]) for row in examples]
    return {"number": number, "at": column(at_A, kind), "steps": column(steps_A, "u2")}


def _short(value: Any) -> Any:
    """Floats to six digits, which is more than a page shows."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    # Lists are of one type, and most are of counts.
    return (
        [_short(one) for one in value] if isinstance(value, list) and value and isinstance(value[0], float) else value
    )
