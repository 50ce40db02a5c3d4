"""Features by brute force, in the form that docs/features.md describes: what pages are tested on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from plmsae_cli.plm.alphabet import AMINO_ACIDS
from plmsae_cli.sae.dictionary import Dictionary

BANDS = (0.0, 0.25, 0.5, 0.75)
CONTEXT = 40
THRESHOLDS = [j / 100 for j in range(100)]
Range = tuple[int, str, int, int]
"""Protein, concept, first and last residue (from 1)."""


def write_features(
    run: Path,
    sae: Dictionary,
    proteins: Sequence[tuple[str, str, str]],
    acts_RN: np.ndarray,
    ranges: Sequence[Range] = (),
    by_residue: frozenset[str] = frozenset(),
    top: int = 20,
    random: int = 4,
    group: int = 16,
    name: str = "planted",
) -> None:
    """`eval/features` of a run: proteins are (id, header, sequence), activations of their residues in that order."""
    folder = run / "eval" / "features"
    (folder / "examples").mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(sequence) for _, _, sequence in proteins])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    letters_R = np.array([AMINO_ACIDS.find(c) % 21 for _, _, sequence in proteins for c in sequence])
    rows, latents = acts_RN.shape
    maximum_N = np.maximum(sae.maximum_N.numpy(), 1e-6)
    share_RN = acts_RN / maximum_N
    protein_R = np.repeat(np.arange(len(proteins)), lengths)
    decile_R = np.concatenate([np.arange(n) * 10 // n for n in lengths])
    w_dec = sae.w_dec_ND.detach().numpy()
    unit = w_dec / np.linalg.norm(w_dec, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    generator = np.random.default_rng(0)
    table: dict[str, list[Any]] = {}
    examples: dict[int, list[dict[str, Any]]] = {}
    concept_rows: list[dict[str, Any]] = []
    best: dict[int, str] = {}
    inside = {c: np.zeros(rows, dtype=bool) for c in {r[1] for r in ranges}}
    spans: dict[str, list[tuple[int, int]]] = {c: [] for c in inside}
    for p, concept, first, last in ranges:
        inside[concept][starts[p] + first - 1 : starts[p] + last] = True
        spans[concept].append((starts[p] + first - 1, starts[p] + last))
    named = {p for p, *_ in ranges}
    for n in range(latents):
        act = acts_RN[:, n]
        fires = np.flatnonzero(act > 0)
        share = share_RN[fires, n]
        bins = np.clip(np.ceil(share * 32) - 1, 0, 31).astype(int)
        near = np.argsort(-cosine[n])[:10]
        some = len(fires) > 0
        logits = generator.normal(size=20)
        row = {
            "latent": n, "firing": len(fires), "density": len(fires) / rows, "max": float(maximum_N[n]),
            "largest": float(act.max()) if some else None, "mean_active": float(act[fires].mean()) if some else None,
            "band_counts": np.bincount(bins // 8, minlength=4).tolist(), "histogram": np.bincount(bins, minlength=32).tolist(),
            "letters": (np.bincount(letters_R[fires], minlength=21)[:20] / len(fires)).tolist() if some else None,
            "deciles": (np.bincount(decile_R[fires], minlength=10) / len(fires)).tolist() if some else None,
            "mean_length": float(lengths[protein_R[fires]].mean()) if some else None,
            "logits": (logits - logits.mean()).tolist(), "row_logits": (logits / 2).tolist(),
            "neighbours": near.tolist(), "neighbour_cosines": cosine[n, near].tolist(),
            "together": near[:3].tolist(), "together_shares": [0.5, 0.25, 0.125], "together_jaccard": [0.25, 0.1, 0.05],
            "parent": n // 4 if n >= latents // 4 else None, "parent_share": 0.5 if n >= latents // 4 else None,
            "description": None, "description_pearson": None, "description_spearman": None,
        }  # fmt: skip
        for key, value in row.items():
            table.setdefault(key, []).append(value)
        scored = []
        for concept, mask in inside.items():
            level = np.searchsorted(
                THRESHOLDS, share_RN[:, n], side="left"
            )  # how many thresholds are strictly exceeded
            point = concept in by_residue
            found = level[mask] if point else np.array([level[a:b].max() for a, b in spans[concept]])
            counts = {
                "inside": np.bincount(level[mask], minlength=101),
                "outside": np.bincount(level[~mask], minlength=101),
                "found": np.bincount(found, minlength=101),
            }
            curve = [scores(counts, j)[2] for j in (0, 15, 50, 60, 80)]
            scored.append((max(curve), (0, 15, 50, 60, 80)[int(np.argmax(curve))], concept, point, counts))
        scored.sort(key=lambda one: -one[0])
        for rank, (value, j, concept, point, counts) in enumerate(scored[:5], 1):
            if value <= 0:
                continue
            best.setdefault(n, concept)
            concept_rows.append(
                {"latent": n, "rank": rank, "concept": concept, "kind": concept.partition(":")[0], "by_residue": point,
                 "threshold": THRESHOLDS[j], **{key: each.tolist() for key, each in counts.items()}}
            )  # fmt: skip
        order = fires[np.argsort(-act[fires], kind="stable")]
        listed = [("top", rank, r) for rank, r in enumerate(order[:top], 1)]
        for band in range(4):
            mine = fires[bins // 8 == band]
            drawn = np.sort(generator.permutation(mine)[:random])
            listed += [("random", rank, r) for rank, r in enumerate(drawn, 1)]
        for kind, rank, r in listed:
            p = int(protein_R[r])
            position = int(r - starts[p]) + 1
            whole = lengths[p] <= 2 * CONTEXT + 400
            first, last = (
                (1, int(lengths[p]))
                if whole
                else (max(1, position - CONTEXT), min(int(lengths[p]), position + CONTEXT))
            )
            window = act[starts[p] + first - 1 : starts[p] + last]
            where = np.flatnonzero(window > 0)
            examples.setdefault(n // group, []).append(
                {"latent": n, "kind": kind, "band": int(min(3, np.searchsorted(BANDS, share_RN[r, n], side="left") - 1)),
                 "rank": rank, "row": int(r), "protein": p, "position": position, "activation": float(act[r]),
                 "first": first, "last": last, "positions": (where + first).tolist(), "activations": window[where].tolist(),
                 "annotated": bool(inside[best[n]][r]) if n in best and p in named else None}
            )  # fmt: skip
    pq.write_table(pa.table(table), folder / "latents.parquet")
    for g in range(-(-latents // group)):
        if g in examples:
            pq.write_table(pa.Table.from_pylist(examples[g]), folder / f"examples/group-{g:05}.parquet")
    pq.write_table(
        pa.table(
            {"protein": range(len(proteins)), "id": [p[0] for p in proteins], "header": [p[1] for p in proteins],
             "length": lengths.tolist(), "sequence": [p[2] for p in proteins],
             "cluster": pa.array([None] * len(proteins), pa.int32()), "annotated": [p in named for p in range(len(proteins))]}
        ),
        folder / "examples/proteins.parquet",
    )  # fmt: skip
    if ranges:
        pq.write_table(pa.Table.from_pylist(concept_rows), folder / "concepts.parquet")
        keys = ("protein", "concept", "start", "stop")
        found = [dict(zip(keys, one, strict=True)) | {"instance": i} for i, one in enumerate(ranges)]
        pq.write_table(pa.Table.from_pylist(found), folder / "examples/annotations.parquet")
    index = {
        "format": "plmsae.features/1", "run": name, "demo": True, "model": {"name": "bundled", "sha256": "0"},
        "dataset": "0", "split": "heldout", "layer": 5, "num_layers": 8, "d": sae.d, "architecture": "topk", "k": 8,
        "num_latents": latents, "prefixes": [latents // 4, latents], "latents_per_group": group, "groups": -(-latents // group),
        "rows": rows, "proteins": len(proteins), "top": top, "random": random, "one_per": "token", "context": CONTEXT,
        "bands": list(BANDS), "histogram_bins": 32, "letters": AMINO_ACIDS,
        "letter_shares": (np.bincount(letters_R, minlength=21)[:20] / rows).tolist(),
        "mean_length": float((lengths**2).sum() / rows),
        "concepts": {"thresholds": THRESHOLDS, "proteins": len(named), "residues": rows, "by": "cluster"} if ranges else None,
        "parts": {"logits": True, "parent": True, "clusters": False, "concepts": bool(ranges), "annotations": bool(ranges),
                  "descriptions": False},
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))


def scores(counts: dict[str, Any], j: int) -> tuple[float, float, float]:
    """Precision, recall and F1 above threshold number j, from counts by level."""
    inside, outside, found = (np.asarray(counts[key]) for key in ("inside", "outside", "found"))
    hits = inside[j + 1 :].sum()
    fired = hits + outside[j + 1 :].sum()
    precision = hits / fired if fired else 0.0
    recall = found[j + 1 :].sum() / found.sum()
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@torch.inference_mode()
def dense(acts_RK: torch.Tensor, indices_RK: torch.Tensor, latents: int) -> np.ndarray:
    """Activations [R, N] of active latents."""
    out = torch.zeros(len(acts_RK), latents)
    return out.scatter_reduce_(1, indices_RK, acts_RK, "amax").numpy()
