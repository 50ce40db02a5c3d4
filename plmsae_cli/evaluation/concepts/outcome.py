"""The last two tasks of a concept test: the frozen choice, and the tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from plmsae_cli.config.evaluation import Concepts
from plmsae_cli.evaluation.concepts.choice import Best, choose
from plmsae_cli.evaluation.concepts.counting import Merged
from plmsae_cli.evaluation.concepts.counts import THRESHOLDS
from plmsae_cli.evaluation.concepts.prepared import AXIS, Prepared
from plmsae_cli.evaluation.concepts.scores import auprc, auroc, bootstrap_f1, interval
from plmsae_cli.evaluation.concepts.sources import SAE
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.runtime.task import Context
from plmsae_cli.store.fs import FileRecord, join
from plmsae_cli.store.tensorfile import TensorFile, write_tensors

ABOVE = 0.5
"""F1 from which a pair counts as found."""
CURVES = 8
"""Concepts, the best ones, whose precision and recall are kept as curves."""
SEED = 0


def _of_source(names: Sequence[str], source: str) -> list[str]:
    return [name for name in names if name.rpartition("/")[2].startswith(f"{source}-")]


def choose_all(
    scope: Scope, prepared: Prepared, options: Concepts, names: Sequence[str], context: Context
) -> list[FileRecord]:
    """Choose for every source on validation; one file a source, `choice-<source>.safetensors`."""
    files = []
    by_residue = [concept.by_residue for concept in prepared.concepts]
    rankable_C = torch.tensor([not concept.amino_acid for concept in prepared.concepts])
    total_CH = torch.from_numpy(prepared.total_CH)
    sources = [SAE, *options.nulls]
    for done, source in enumerate(sources):
        context.check_stop()
        mine = _of_source(names, source)
        width = max(
            int(meta["first"]) + int(meta["size"])
            for meta in (TensorFile(scope.store, join(scope.folder, name)).metadata for name in mine)
        )
        merged = Merged(scope, mine, width, by_residue)
        again = options.mode == "interplm_compat"
        best = choose(merged.chunks(int(options.memory) // 4), merged.fired_HNT, total_CH, rankable_C, again)
        tensors = {field.name.rpartition("_")[0]: getattr(best, field.name).contiguous() for field in fields(Best)}
        files.append(write_tensors(scope.store, scope.path(AXIS, f"choice-{source}.safetensors"), tensors))
        context.progress(done + 1, len(sources))
    return files


class Outcome:
    """The frozen pairs of one source with their counts on test: the best latent of each concept."""

    def __init__(self, scope: Scope, prepared: Prepared, source: str, names: Sequence[str], draws: int) -> None:
        choice = TensorFile(scope.store, scope.path(AXIS, f"choice-{source}.safetensors"))
        self.choice = {name: choice.read(name) for name in choice.names()}
        files = [TensorFile(scope.store, join(scope.folder, name)) for name in sorted(_of_source(names, source))]
        table_P4C = torch.cat([file.read("table") for file in files])
        # In the order of the proteins, which draws for intervals depend on.
        table_P4C = table_P4C[torch.cat([file.read("place") for file in files]).argsort()]
        self.positive_CB = torch.stack([file.read("positive") for file in files]).sum(0)
        self.negative_CB = torch.stack([file.read("negative") for file in files]).sum(0)
        self.drawn_QC = bootstrap_f1(table_P4C, draws, SEED)
        self.interval_2C = interval(self.drawn_QC)
        self.auroc_C, self.auprc_C = (f(self.positive_CB, self.negative_CB) for f in (auroc, auprc))
        self.real_C = torch.tensor([not concept.amino_acid for concept in prepared.concepts])

    def summary(self) -> dict[str, Any]:
        """Headline figures over all concepts but the amino acids."""
        f1_C = self.choice["f1"][self.real_C, 1]
        listed_NL = (self.choice["concept"] >= 0) & (self.choice["listed_f1"][..., 1] > ABOVE)
        mean_Q = self.drawn_QC[:, self.real_C].nanmean(1)
        above_Q = (self.drawn_QC[:, self.real_C] > ABOVE).sum(1)
        amino_C = self.choice["f1"][~self.real_C, 1]
        return {
            "latents": len(self.choice["concept"]),
            "concepts_above": int((f1_C > ABOVE).sum()),
            "interval_concepts_above": interval(above_Q).tolist(),
            "latents_above": int(listed_NL.any(1).sum()),
            "mean_f1": float(f1_C.mean()),
            "interval_mean_f1": interval(mean_Q).tolist(),
            "mean_auroc": float(self.auroc_C[self.real_C].nanmean()),
            "mean_auprc": float(self.auprc_C[self.real_C].nanmean()),
            "amino_acids_above": int((amino_C > ABOVE).sum()),
            "f1": f1_C.tolist(),
        }

    def row(self, c: int) -> dict[str, Any]:
        """The best latent of one concept."""
        low, high = self.interval_2C[:, c].tolist()
        return {
            "latent": int(self.choice["latent"][c]),
            "threshold": THRESHOLDS[int(self.choice["threshold"][c])],
            "f1_validation": float(self.choice["f1"][c, 0]),
            "precision": float(self.choice["precision"][c, 1]),
            "recall": float(self.choice["recall"][c, 1]),
            "f1": float(self.choice["f1"][c, 1]),
            "interval_f1": [low, high] if low == low else None,
            "auroc": _number(self.auroc_C[c]),
            "auprc": _number(self.auprc_C[c]),
        }

    def curve(self, c: int) -> dict[str, list[float]]:
        """Precision and recall by residue on test at each bin's lower edge, from the highest."""
        hits = self.positive_CB[c].double().flip(0).cumsum(0)[:-1]
        fired = (self.positive_CB[c] + self.negative_CB[c]).double().flip(0).cumsum(0)[:-1]
        some = fired > 0
        recall, precision = hits[some] / self.positive_CB[c].sum(), hits[some] / fired[some]
        return {"recall": recall.tolist(), "precision": precision.tolist()}


def _number(value: Tensor) -> float | None:
    return float(value) if bool(torch.isfinite(value)) else None


def report(scope: Scope, prepared: Prepared, options: Concepts, names: Sequence[str]) -> list[FileRecord]:
    """result.json, latents.parquet, latent_concepts.parquet and proteins.parquet of the axis."""
    found = {source: Outcome(scope, prepared, source, names, options.bootstraps) for source in (SAE, *options.nulls)}
    ours = found[SAE]
    concepts = []
    for c, concept in enumerate(prepared.concepts):
        row: dict[str, Any] = {
            "concept": concept.name,
            "kind": concept.kind,
            "recall_by": "residue" if concept.by_residue else "instance",
        }
        row |= {"residues": prepared.positive_CH[c].tolist(), "total": prepared.total_CH[c].tolist(), **ours.row(c)}
        row["nulls"] = {name: float(found[name].choice["f1"][c, 1]) for name in options.nulls}
        concepts.append(row)
    real = [row for row, concept in zip(concepts, prepared.concepts, strict=True) if not concept.amino_acid]
    ranked = sorted(range(len(real)), key=lambda c: -real[c]["f1_validation"])
    facts = prepared.facts
    result = {
        **{key: facts[key] for key in ("mode", "split", "clusters", "proteins", "residues", "cofactors_without_place")},
        "thresholds": list(THRESHOLDS),
        "concepts": len(real),
        "order": list(found),
        "codes": {source: outcome.summary() for source, outcome in found.items()},
        "best": real,
        "amino_acids": concepts[len(real) :],
        "curves": [{"concept": real[c]["concept"], **ours.curve(c)} for c in ranked[:CURVES]],
    }
    chosen = scope.read_table(AXIS, "chosen.parquet")
    proteins = {
        "id": chosen["id"],
        "length": [len(text) for text in chosen["sequence"].to_pylist()],
        "in_training": chosen["in_training"],
        "concepts_half": ["test" if t else "validation" for t in prepared.test_P],
        "concepts_cluster": chosen["cluster"],
    }
    return [
        scope.write_json(AXIS, "result.json", result),
        scope.write_table(AXIS, "latents.parquet", _latents(ours.choice, prepared)),
        scope.write_table(AXIS, "latent_concepts.parquet", _pairs(ours.choice, prepared)),
        scope.write_table(AXIS, "proteins.parquet", proteins),
    ]


def _latents(choice: dict[str, Tensor], prepared: Prepared) -> dict[str, Any]:
    """The best concept of each latent on validation, with its score on test; null where it found none."""
    concept_N = choice["concept"][:, 0].tolist()

    def column(values: Tensor) -> list[float | None]:
        return [v if c >= 0 else None for v, c in zip(values.tolist(), concept_N, strict=True)]

    return {
        "latent": list(range(len(concept_N))),
        "concept": [prepared.concepts[c].name if c >= 0 else None for c in concept_N],
        "concept_threshold": [
            THRESHOLDS[t] if c >= 0 else None
            for t, c in zip(choice["listed_threshold"][:, 0].tolist(), concept_N, strict=True)
        ],
        "concept_f1_validation": column(choice["listed_f1"][:, 0, 0]),
        "concept_f1": column(choice["listed_f1"][:, 0, 1]),
        "concept_precision": column(choice["listed_precision"][:, 0, 1]),
        "concept_recall": column(choice["listed_recall"][:, 0, 1]),
    }


def _pairs(choice: dict[str, Tensor], prepared: Prepared) -> dict[str, Any]:
    """Up to ten concepts a latent, best on validation first."""
    latent_Q, place_Q = (choice["concept"] >= 0).nonzero(as_tuple=True)
    concept_Q = choice["concept"][latent_Q, place_Q].tolist()
    return {
        "latent": latent_Q.tolist(),
        "concept": [prepared.concepts[c].name for c in concept_Q],
        "kind": [prepared.concepts[c].kind for c in concept_Q],
        "rank": (place_Q + 1).tolist(),
        "threshold": [THRESHOLDS[t] for t in choice["listed_threshold"][latent_Q, place_Q].tolist()],
        "f1_validation": choice["listed_f1"][latent_Q, place_Q, 0].tolist(),
        "precision": choice["listed_precision"][latent_Q, place_Q, 1].tolist(),
        "recall": choice["listed_recall"][latent_Q, place_Q, 1].tolist(),
        "f1": choice["listed_f1"][latent_Q, place_Q, 1].tolist(),
    }
