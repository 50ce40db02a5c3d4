"""Families of the proteins that are read: the owners of a list's entries where it holds one of each, and the relatives of a
protein with a firing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from plmsae_cli.evaluation.clusters import choose_method, cluster
from plmsae_cli.evaluation.features.job import AXIS, CLUSTERS, Job
from plmsae_cli.evaluation.features.reading import Side
from plmsae_cli.evaluation.features.source import unknown_sequences
from plmsae_cli.store.fs import FileRecord


def cluster_all(job: Job) -> list[FileRecord]:
    """The table that `Job.clusters` reads."""
    return [job.scope.write_table(AXIS, CLUSTERS, {"cluster": clusters_of(job, job.side)})]


def clusters_of(job: Job, side: Side) -> npt.NDArray[np.int64]:
    """The cluster of every protein of a side, by the place of its representative.

    Raises:
        UserError: no sequence is known.
    """
    sequences = side.proteins(["sequence"])["sequence"].to_pylist()
    if not any(sequences):
        raise unknown_sequences()
    return cluster(sequences, choose_method(job.options.clusters))
