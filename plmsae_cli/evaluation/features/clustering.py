"""The owners of a list's entries where it holds one of each cluster of similar proteins."""

from __future__ import annotations

from plmsae_cli.evaluation.clusters import choose_method, cluster
from plmsae_cli.evaluation.features.job import AXIS, CLUSTERS, Job
from plmsae_cli.store.fs import FileRecord


def cluster_all(job: Job) -> list[FileRecord]:
    """The cluster of every protein of the side, by the place of its representative."""
    sequences = job.side.proteins(["sequence"])["sequence"].to_pylist()
    cluster_P = cluster(sequences, choose_method(job.options.clusters))
    return [job.scope.write_table(AXIS, CLUSTERS, {"cluster": cluster_P})]
