"""What the annotation file says of the proteins shown: their ranges, and whether an example lies inside its latent's concept."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from plmsae_cli.evaluation.annotations.entries import read_entries
from plmsae_cli.evaluation.concepts.vocabulary import find_concepts
from plmsae_cli.evaluation.features import layout
from plmsae_cli.evaluation.features.concept_counts import listed
from plmsae_cli.evaluation.features.job import Job
from plmsae_cli.evaluation.frame import write_table
from plmsae_cli.store.fs import FileRecord
from plmsae_cli.store.split import split_hash
from plmsae_cli.store.tables import read_table

KNOWN = "annotate/known.parquet"


def annotate(job: Job, merged: list[str]) -> list[FileRecord]:
    """Ranges of the listed concepts in shown proteins, by sequence; and which of these the annotation file has."""
    options = job.scope.options.concepts
    assert options is not None
    shown = job.shown_proteins(merged)
    texts = job.side.proteins(["sequence"])["sequence"].take(shown).to_pylist()
    number = {split_hash(text): protein for protein, text in zip(shown.tolist(), texts, strict=True) if text}
    path = job.scope.store.local(options.annotations)
    entries = {number[mark]: entry for entry in read_entries(path) if (mark := split_hash(entry.sequence)) in number}
    proteins = sorted(entries)
    labels = find_concepts([entries[protein] for protein in proteins], options.mode, 1)
    wanted = set(listed(job)["concept"].to_pylist())
    kept = [m for m, concept in enumerate(labels.concept_M) if labels.concepts[concept].name in wanted]
    columns = {
        "protein": np.array(proteins, dtype=np.int32)[labels.protein_M[kept]],
        "concept": [labels.concepts[concept].name for concept in labels.concept_M[kept]],
        "start": (labels.start_M[kept] + 1).astype(np.int32),
        "stop": labels.stop_M[kept].astype(np.int32),
        "instance": labels.instance_M[kept].astype(np.int32),
    }
    store = job.scope.store
    table = pa.table(columns, schema=layout.ANNOTATIONS_SCHEMA)
    return [
        write_table(store, job.path(layout.ANNOTATIONS), table),
        write_table(store, job.path(KNOWN), {"protein": pa.array(proteins, pa.int32())}),
    ]


class Inside:
    """Whether residues lie inside the best concept of latents."""

    def __init__(self, job: Job) -> None:
        store = job.scope.store
        known = read_table(store, job.path(KNOWN))["protein"].to_numpy()
        self._known_P = np.zeros(len(job.side.length_P), dtype=bool)
        self._known_P[known] = True
        best = listed(job)
        best = best.filter(best["rank"].to_numpy() == 1)
        names = sorted(set(best["concept"].to_pylist()))
        place = {name: index for index, name in enumerate(names)}
        self._concept_N = np.full(job.num_latents, -1, dtype=np.int64)
        self._concept_N[best["latent"].to_numpy()] = [place[name] for name in best["concept"].to_pylist()]
        ranges = read_table(store, job.path(layout.ANNOTATIONS))
        kept = [m for m, name in enumerate(ranges["concept"].to_pylist()) if name in place]
        ranges = ranges.take(pa.array(kept, pa.int64()))
        self._longest = int(job.side.length_P.max()) + 2
        self._proteins = len(self._known_P)
        concept_M = np.array([place[name] for name in ranges["concept"].to_pylist()], dtype=np.int64)
        key_M = self._key(concept_M, ranges["protein"].to_numpy())
        start_M, stop_M = key_M + ranges["start"].to_numpy(), key_M + ranges["stop"].to_numpy()
        order = np.argsort(start_M, kind="stable")
        self._start_M = start_M[order]
        # Ranges may overlap: what reaches furthest so far decides, and no range reaches another protein's keys.
        self._stop_M = np.maximum.accumulate(stop_M[order]) if len(order) else stop_M

    def _key(self, concept: Any, protein: Any) -> npt.NDArray[np.int64]:
        found: npt.NDArray[np.int64] = (concept * self._proteins + protein.astype(np.int64)) * self._longest
        return found

    def column(self, table: pa.Table) -> pa.Array:
        """`annotated` of a table of examples."""
        protein_E = table["protein"].to_numpy()
        concept_E = self._concept_N[table["latent"].to_numpy()]
        told_E = self._known_P[protein_E] & (concept_E >= 0)
        residue_E = self._key(concept_E, protein_E) + table["position"].to_numpy()
        place_E = np.searchsorted(self._start_M, residue_E, side="right") - 1
        inside_E = np.zeros(len(told_E), dtype=bool)
        if len(self._stop_M):
            inside_E = (place_E >= 0) & (self._stop_M[place_E] >= residue_E)
        return pa.array(inside_E, mask=~told_E)
