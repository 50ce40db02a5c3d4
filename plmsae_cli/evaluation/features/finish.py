"""The last step: index.json, latents.parquet, the proteins shown, and the axis's figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from plmsae_cli.evaluation.features import concept_counts, layout
from plmsae_cli.evaluation.features.annotated import KNOWN
from plmsae_cli.evaluation.features.describe import ANSWERS
from plmsae_cli.evaluation.features.job import AXIS, Job
from plmsae_cli.evaluation.features.latent_rows import known_model, prefixes
from plmsae_cli.evaluation.frame import write_table
from plmsae_cli.plm.alphabet import AMINO_ACIDS
from plmsae_cli.store.fs import FileRecord
from plmsae_cli.store.tables import read_table


def collect(job: Job, merged: list[str]) -> list[FileRecord]:
    """proteins.parquet, and concepts.parquet where there are concepts."""
    files = [_proteins(job, merged)]
    if job.has_concepts:
        files.append(concept_counts.concepts_table(job, job.files(f"count-{job.late}", "counts")))
    return files


def finish(job: Job, written: list[str]) -> list[FileRecord]:
    """What a reader opens first."""
    store, side = job.scope.store, job.side
    table = pa.concat_tables([read_table(store, path) for path in written])
    if job.options.describe is not None:
        table = _with_descriptions(table, read_table(store, job.path(*ANSWERS)))
    parts = [name for name, there in _parts(job, table).items() if there]
    files = [write_table(store, job.path(layout.LATENTS), table)]
    length_P = side.length_P
    letters = np.array([np.count_nonzero(side.letter_R == number) for number in range(len(AMINO_ACIDS))])
    manifest, facts = job.scope.made(), job.saved.facts
    figures: dict[str, Any] = {
        "rows": side.rows,
        "proteins": len(length_P),
        "latents_shown": int((table["firing"].to_numpy() > 0).sum()),
        "split": job.options.split,
    }
    if (scores := table["description_pearson"].drop_null().to_numpy()).size:
        spearman = table["description_spearman"].drop_null().to_numpy()
        figures |= {"described": len(scores), "pearson": float(scores.mean()), "spearman": float(spearman.mean())}
    index = {
        "format": layout.FORMAT,
        "run": job.scope.experiment.name,
        "demo": (manifest["weights"] or {}).get("name") == "bundled",
        "model": manifest["weights"],
        "dataset": job.scope.lineage.dataset().key,
        "split": job.options.split,
        "layer": manifest["layer"],
        "num_layers": manifest.get("num_layers"),
        "d": job.saved.model.d,
        "architecture": facts["config"]["architecture"],
        "k": facts["config"].get("k"),
        "num_latents": job.num_latents,
        "prefixes": prefixes(job.saved.model) if "parent" in parts else None,
        "latents_per_group": job.per_group,
        "groups": job.groups,
        "rows": side.rows,
        "proteins": len(length_P),
        "top": job.options.top,
        "random": job.options.random,
        "one_per": job.options.one_per,
        "context": job.options.context,
        "bands": list(layout.BANDS),
        "histogram_bins": layout.HISTOGRAM_BINS,
        "letters": AMINO_ACIDS,
        "letter_shares": (letters / side.rows).tolist(),
        "mean_length": float((length_P.astype(np.float64) ** 2).sum() / side.rows),
        "concepts": concept_counts.facts(job) if job.has_concepts else None,
        "parts": sorted(parts),
    }
    files.append(job.scope.write_json(AXIS, layout.INDEX, index))
    files.append(job.scope.write_json(AXIS, "result.json", figures))
    return files


def _with_descriptions(table: pa.Table, answers: pa.Table) -> pa.Table:
    """latents.parquet's columns filled from the answers, which are of some latents."""
    place = answers["latent"].to_numpy()
    for name in answers.column_names[1:]:
        values: list[Any] = [None] * len(table)
        for latent, value in zip(place, answers[name].to_pylist(), strict=True):
            values[latent] = value
        field = table.schema.field(name)
        table = table.set_column(table.column_names.index(name), field, pa.array(values, field.type))
    return table


def _parts(job: Job, table: pa.Table) -> dict[str, bool]:
    return {
        "logits": known_model(job),
        "parent": len(prefixes(job.saved.model)) > 1,
        "clusters": job.options.one_per == "cluster",
        "concepts": job.has_concepts,
        "annotations": job.has_concepts,
        "descriptions": table["description"].null_count < len(table),
    }


def _proteins(job: Job, merged: list[str]) -> FileRecord:
    """The proteins of the examples."""
    chosen = job.shown_proteins(merged)
    cluster_P = job.clusters()
    about = job.side.proteins(["id", "description", "sequence"]).take(chosen)
    known = pa.nulls(len(chosen), pa.bool_())
    if job.has_concepts:
        found = read_table(job.scope.store, job.path(KNOWN))["protein"].to_numpy()
        known = pa.array(np.isin(chosen, found))
    columns: dict[str, Any] = {
        "protein": chosen.astype(np.int32),
        "id": about["id"],
        "header": about["description"],
        "length": job.side.length_P[chosen].astype(np.int32),
        "sequence": about["sequence"],
        "cluster": pa.nulls(len(chosen), pa.int32()) if cluster_P is None else cluster_P[chosen].astype(np.int32),
        "annotated": known,
    }
    table = pa.table(columns, schema=layout.PROTEINS_SCHEMA)
    return write_table(job.scope.store, job.path(layout.PROTEINS), table)
