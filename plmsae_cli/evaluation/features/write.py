"""Of a share of the latents: the groups of examples, and the rows of latents.parquet."""

from __future__ import annotations

import pyarrow as pa

from plmsae_cli.evaluation.features import layout
from plmsae_cli.evaluation.features.about_latents import Together
from plmsae_cli.evaluation.features.annotated import Inside
from plmsae_cli.evaluation.features.examples import Along, along, examples_table
from plmsae_cli.evaluation.features.files import Grouped, runs, share
from plmsae_cli.evaluation.features.job import Job
from plmsae_cli.evaluation.features.latent_rows import LatentRows
from plmsae_cli.evaluation.frame import write_table
from plmsae_cli.store.fs import FileRecord

_ENTRY = 96
"""Bytes of a gathered activation while its examples are put together: it may be of several."""


def write(job: Job, index: int, of: int, merged: list[str], gathered: list[str], beside: list[str]) -> list[FileRecord]:
    """Share `index` of the latents."""
    store = job.scope.store
    first_group, last_group = share(job.groups, index, of)
    lists, activations, others = Grouped(store, [merged[index]]), Grouped(store, gathered), Grouped(store, beside)
    about = LatentRows(job, merged)
    inside = Inside(job) if job.has_concepts else None
    sizes = [
        a + b
        for a, b in zip(activations.sizes(first_group, last_group), others.sizes(first_group, last_group), strict=True)
    ]
    files, rows = [], []
    for start, stop in runs(sizes, job.buffered(_ENTRY), first_group):
        columns = {
            name: activations.read(name, start, stop).numpy() for name in ("latent", "protein", "position", "act")
        }
        found = along(columns, job.side)
        pairs = [others.read(name, start, stop).long().numpy() for name in ("latent", "other")]
        together = Together(pairs[0], pairs[1], about.sampled_N, about.firing_N)
        for group in range(start, stop):
            job.context.check_stop()
            files.append(_examples(job, group, lists, found, inside))
            rows += about.rows(group, together)
        job.context.progress(stop - first_group, last_group - first_group, unit="groups")
    table = pa.Table.from_pylist(rows, schema=layout.LATENTS_SCHEMA)
    return [*files, write_table(store, job.path("latents", f"{index}of{of}.parquet"), table)]


def _examples(job: Job, group: int, lists: Grouped, found: Along, inside: Inside | None) -> FileRecord:
    place_E, row_E = (lists.read(name, group, group + 1) for name in ("place", "row"))
    table = examples_table(
        place_E, row_E.numpy(), found, job.side, job.options.context, job.saved.model.maximum_N.cpu()
    )
    if inside is not None:
        table = table.set_column(table.column_names.index("annotated"), "annotated", inside.column(table))
    return write_table(job.scope.store, job.path(layout.group_file(group)), table)
