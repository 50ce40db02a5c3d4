"""The first page's data: every latent in columns, a few bytes each, and what its windows look like for motif search."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from plmsae_cli.browse.features import Features, Row
from plmsae_cli.browse.layout import CLUSTERS, Layout
from plmsae_cli.browse.scripts import column

MOTIF_EXAMPLES = 20
"""Strongest examples of a latent whose windows a motif is looked for in."""
MOTIF_REACH = 10
"""Residues on either side of the strongest one."""
_PLURALS = {"concept": "concepts", "family": "families", "pattern": "patterns", "description": "descriptions"}


def index_body(features: Features, layout: Layout | None, group: int, motif_files: int) -> dict[str, Any]:
    """What `data/<n>/index.js` holds."""
    about, table, found = features.index, features.latents, features.found
    columns = {
        "density": column(table["density"], "f4"),
        "max": column(table["max"], "f4"),
    }
    strings: dict[str, list[str]] = {}
    words = {**{name: found.get(name, ()) for name in _PLURALS}, "description": table.get("description", ())}
    for name, values in words.items():
        if any(values):
            strings[_PLURALS[name]], columns[name] = _coded(values)
    for name in ("concept_f1", "family_f1"):
        if any(value is not None for value in found.get(name, ())):
            columns[name] = column([np.nan if value is None else value for value in found[name]], "f4")
    if layout is not None:
        columns |= {"x": column(layout.place_N2[:, 0] * 65535, "u2"), "y": column(layout.place_N2[:, 1] * 65535, "u2")}
        columns["cluster"] = column(layout.cluster_N, "u1")
    columns["letter"] = column([_letter(letters) for letters in table["letters"]], "u1")
    keys = (
        "run", "demo", "model", "layer", "num_layers", "architecture", "k", "num_latents", "prefixes", "rows", "proteins",
        "bands", "one_per", "letters", "letter_shares", "mean_length",
    )  # fmt: skip
    body = {key: about.get(key) for key in keys}
    body |= {"group": group, "columns": columns, "strings": strings, "motif_files": motif_files}
    body["thresholds"] = (about.get("concepts") or {}).get("thresholds")
    if features.steering:
        body["steering"] = features.steering
    if layout is not None:
        body["clusters"] = cluster_names(layout, found)
    return body


def cluster_names(layout: Layout, found: dict[str, list[Any]]) -> list[str]:
    """The concept (or family) that each cluster has most above chance, of those its latents find with F1 of at least a half.

    The excess is the number in the cluster less the number expected from the cluster's size. A name goes to the cluster with
    most of it, so that no two have the same; "" where none is left.
    """
    seen: list[dict[str, int]] = [{} for _ in range(min(CLUSTERS, int(layout.cluster_N.max()) + 1))]
    total: dict[str, int] = {}
    for latent, k in enumerate(layout.cluster_N.tolist()):
        for what, score in (("concept", "concept_f1"), ("family", "family_f1")):
            name = found[what][latent] if what in found else None
            if name is not None and (found[score][latent] or 0) >= 0.5:
                seen[k][name] = seen[k].get(name, 0) + 1
                total[name] = total.get(name, 0) + 1
                break
    excess = [
        (number - float((layout.cluster_N == k).mean()) * total[name], name, k)
        for k, here in enumerate(seen)
        for name, number in here.items()
    ]
    names = [""] * len(seen)
    for size, name, k in sorted(excess, key=lambda one: (-one[0], one[1:])):
        if size > 0 and not names[k] and name not in names:
            names[k] = name
    return names


def _coded(values: Sequence[str | None]) -> tuple[list[str], dict[str, str]]:
    """The distinct strings in order, and each value's place among them; beyond the last for none."""
    names = sorted({value for value in values if value is not None})
    place = {name: i for i, name in enumerate(names)}
    kind = "u2" if len(names) < 1 << 16 else "u4"
    return names, column([len(names) if value is None else place[value] for value in values], kind)


def _letter(shares: Sequence[float] | None) -> int:
    """The amino acid on which the latent fires most often; 255 where it never fires."""
    return 255 if shares is None else int(np.argmax(shares))


def windows(examples: Iterable[Row], proteins: dict[int, Row]) -> list[str]:
    """Sequences around the strongest examples of a latent, `-` beyond the ends, the strongest residue in the middle."""
    found = []
    for row in examples:
        if row["kind"] != "top" or row["rank"] > MOTIF_EXAMPLES:
            continue
        sequence, middle = proteins[row["protein"]]["sequence"], row["position"] - 1
        if sequence:
            padded = "-" * MOTIF_REACH + sequence + "-" * MOTIF_REACH
            found.append(padded[middle : middle + 2 * MOTIF_REACH + 1])
    return found
