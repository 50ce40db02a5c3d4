"""A made-up `eval/features/` with every part, for whoever reads it: python tests/evaluation/features_example.py FOLDER."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from plmsae_cli.evaluation.features import layout
from plmsae_cli.plm.alphabet import AMINO_ACIDS

HEADERS = (
    "SH3 domain OS=Homo sapiens",
    "<script>alert(1)</script> \"quoted\" & 'single'",
    "../../etc/passwd \x07 bell",
)
CONCEPT_NAMES = ("Domain [FT]: SH3", "Transmembrane: Helical", "Active site: Nucleophile", "Helix")


def write_example(
    folder: Path, num_latents: int = 200, proteins: int = 40, latents_per_group: int = 64, top: int = 20, seed: int = 0
) -> None:
    """Write the folder. Latent 0 never fired, latent 1 is dense, latent 2 has no concept; values are random but agree."""
    draw = np.random.default_rng(seed)
    groups = -(-num_latents // latents_per_group)
    lengths = draw.integers(40, 900, proteins)
    sequences = ["".join(draw.choice(list(AMINO_ACIDS), n)) for n in lengths]
    thresholds = [j / 100 for j in range(layout.LEVELS)]
    index = {
        "format": layout.FORMAT, "run": "example", "demo": True, "model": {"name": "bundled", "sha256": "0" * 64},
        "dataset": "0" * 16, "split": "train", "layer": 5, "num_layers": 6, "d": 192, "architecture": "matryoshka_topk",
        "k": 32, "num_latents": num_latents, "prefixes": [num_latents // 4, num_latents // 2, num_latents],
        "latents_per_group": latents_per_group, "groups": groups, "rows": int(lengths.sum()), "proteins": proteins,
        "top": top, "random": 5, "one_per": "protein", "context": 1022, "bands": list(layout.BANDS),
        "histogram_bins": layout.HISTOGRAM_BINS, "letters": AMINO_ACIDS, "letter_shares": [0.05] * 20,
        "mean_length": float((lengths**2).sum() / lengths.sum()),
        "concepts": {"thresholds": thresholds, "proteins": 40, "residues": 16000, "by": "MMseqs2 cluster"},
        "parts": ["annotations", "concepts", "descriptions", "logits", "parent"],
    }  # fmt: skip
    (folder / layout.EXAMPLES).mkdir(parents=True, exist_ok=True)
    (folder / layout.INDEX).write_text(json.dumps(index, sort_keys=True, indent=1))
    (folder / "result.json").write_text(json.dumps({"rows": index["rows"], "latents_shown": num_latents - 1}))
    _write(folder, layout.PROTEINS, layout.PROTEINS_SCHEMA, [
        {"protein": p, "id": f"sp|P{p:05}|X{p}_HUMAN", "header": HEADERS[p % 3], "length": int(lengths[p]),
         "sequence": sequences[p], "annotated": p % 2 == 0}
        for p in range(proteins)
    ])  # fmt: skip
    _write(folder, layout.ANNOTATIONS, layout.ANNOTATIONS_SCHEMA, [
        {"protein": p, "concept": name, "start": 10 + 5 * i, "stop": 20 + 5 * i, "instance": 4 * p + i}
        for p in range(0, proteins, 2) for i, name in enumerate(CONCEPT_NAMES)
    ])  # fmt: skip
    latents, concepts = [], []
    for group in range(groups):
        examples: list[dict[str, Any]] = []
        for latent in range(group * latents_per_group, min(num_latents, (group + 1) * latents_per_group)):
            mine = [] if latent == 0 else _examples(draw, latent, lengths, top)
            examples += mine
            latents.append(_latent(draw, latent, num_latents, bool(mine), index))
            if latent > 2:
                concepts += [_concept(draw, latent, rank) for rank in (1, 2)]
        _write(folder, layout.group_file(group), layout.EXAMPLES_SCHEMA, examples)
    _write(folder, layout.LATENTS, layout.LATENTS_SCHEMA, latents)
    _write(folder, layout.CONCEPTS, layout.CONCEPTS_SCHEMA, concepts)


def _examples(draw: Any, latent: int, lengths: Any, top: int) -> list[dict[str, Any]]:
    made = []
    for kind, band, number in (("top", 3, top), *(("random", band, 5) for band in range(4))):
        values = np.sort(draw.uniform(layout.BANDS[band] + 0.01, layout.BANDS[band] + 0.25, number))[::-1]
        for rank, value in enumerate(values, 1):
            protein = int(draw.integers(len(lengths)))
            positions = np.unique(draw.integers(1, lengths[protein] + 1, 300 if latent == 1 else 12))
            activations = draw.uniform(0.01, value, len(positions)).astype(np.float32)
            here = int(draw.integers(len(positions)))
            activations[here] = value
            made.append({
                "latent": latent, "kind": kind, "band": band, "rank": rank,
                "row": int(lengths[:protein].sum() + positions[here] - 1), "protein": protein, "position": int(positions[here]),
                "activation": float(activations[here]), "first": 1, "last": int(lengths[protein]),
                "positions": positions.tolist(), "activations": activations.tolist(),
                "annotated": None if protein % 2 or latent <= 2 else bool(draw.random() < 0.7),
            })  # fmt: skip
    return made


def _latent(draw: Any, latent: int, num_latents: int, fired: bool, index: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "latent": latent, "firing": 0, "density": 0.0, "max": 0.0, "largest": 0.0, "band_counts": [0] * 4,
        "histogram": [0] * 32, "neighbours": [(latent + 1 + i) % num_latents for i in range(10)],
        "neighbour_cosines": [0.9 - 0.08 * i for i in range(10)],
        "logits": draw.normal(size=20).tolist(), "row_logits": draw.normal(size=20).tolist(),
    }  # fmt: skip
    if fired:
        histogram = np.sort(draw.integers(1, 400 if latent > 1 else 40000, 32))[::-1]
        firing = int(histogram.sum())
        row |= {
            "firing": firing, "density": firing / max(index["rows"], firing), "max": 1.0, "largest": 1.02, "mean_active": 0.3,
            "histogram": histogram.tolist(), "band_counts": histogram.reshape(4, 8).sum(1).tolist(),
            "letters": draw.dirichlet(np.full(20, 0.3)).tolist(), "deciles": draw.dirichlet(np.full(10, 2.0)).tolist(),
            "mean_length": float(draw.uniform(200, 600)), "together": [(latent + 7) % num_latents], "together_shares": [0.4],
            "together_jaccard": [0.2], "description": f"Residues of motif {latent}" if latent % 3 == 0 else None,
            "description_pearson": 0.5 if latent % 3 == 0 else None,
            "description_spearman": 0.4 if latent % 3 == 0 else None,
        }  # fmt: skip
        if latent >= index["prefixes"][0]:
            row |= {"parent": int(draw.integers(index["prefixes"][0])), "parent_share": 0.6}
    return row


def _concept(draw: Any, latent: int, rank: int) -> dict[str, Any]:
    name = CONCEPT_NAMES[(latent + rank) % 4]
    inside, outside = (np.sort(draw.integers(0, high, 101))[::-1] for high in (60, 30))
    by_residue = name.startswith("Active")
    found = inside if by_residue else inside // 8 + 1
    return {
        "latent": latent, "rank": rank, "concept": name, "kind": name.partition(":")[0], "by_residue": by_residue,
        "threshold": 0.5, "inside": inside.tolist(), "outside": outside.tolist(), "found": found.tolist(),
    }  # fmt: skip


def _write(folder: Path, name: str, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / name, compression="zstd")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latents", type=int, default=200)
    parser.add_argument("--proteins", type=int, default=40)
    given = parser.parse_args()
    write_example(given.folder, given.latents, given.proteins)
