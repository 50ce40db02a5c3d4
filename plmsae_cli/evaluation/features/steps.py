"""Which module does which step."""

from __future__ import annotations

from plmsae_cli.evaluation.features.annotated import annotate
from plmsae_cli.evaluation.features.clustering import cluster_all
from plmsae_cli.evaluation.features.concept_counts import count
from plmsae_cli.evaluation.features.describe import describe
from plmsae_cli.evaluation.features.finish import collect, finish
from plmsae_cli.evaluation.features.gather import gather
from plmsae_cli.evaluation.features.job import Job
from plmsae_cli.evaluation.features.merge import merge
from plmsae_cli.evaluation.features.select import select
from plmsae_cli.evaluation.features.write import write
from plmsae_cli.store.fs import FileRecord


def run(step: str, job: Job) -> list[FileRecord]:
    """The files of one task."""
    index, of = job.task.args.get("index", 0), job.task.args.get("of", 1)
    if step == "cluster":
        return cluster_all(job)
    if step == "select":
        return select(job, index, of)
    if step == "count":
        return count(job, index, of)
    if step == "merge":
        return merge(job, index, of, job.files("select", "select"))
    merged = job.files("merge", "merge")
    if step == "gather":
        return gather(job, index, of, merged)
    if step == "annotate":
        return annotate(job, merged)
    if step == "write":
        return write(job, index, of, merged, job.files("gather", "gather"), job.files("gather", "beside"))
    if step == "collect":
        return collect(job, merged)
    written = job.files(f"write-{job.late}", "latents")
    return describe(job, written) if step == "describe" else finish(job, written)
