"""Residues of held-out proteins that tell whether a description of a latent is right.

For each latent random firings, one a protein; for each of these a random residue of a protein of the same family (its cluster, or
where it is alone in it the protein itself), and a random residue of any protein. Letters: N latents, Q questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from plmsae_cli.evaluation.features.clustering import clusters_of
from plmsae_cli.evaluation.features.job import Job
from plmsae_cli.evaluation.features.ranking import KEY_BITS, Lists, pair_hash
from plmsae_cli.evaluation.features.reading import Reader, Side
from plmsae_cli.evaluation.features.source import where
from plmsae_cli.store.permutation import counter_hash

Ints = npt.NDArray[np.int64]
_FIRING, _RELATIVE, _RESIDUE, _ANY, _ORDER = range(1, 6)
"""Seeds."""
KINDS = ("firing", "family", "any")


@dataclass(frozen=True)
class Questions:
    """Residues in question, by latent, in an order that tells nothing of them."""

    latent_Q: Ints
    number_Q: Ints
    """Among the latent's, from 0."""
    kind_Q: Ints
    """Of KINDS: why it was drawn."""
    row_Q: Ints
    truth_Q: npt.NDArray[np.float32]
    """The latent's activation there, 0 where it is silent."""


def questions(job: Job, number: int) -> tuple[Questions, Side]:
    """`number` of each kind a latent at most, and the side that has their rows."""
    side = Side(job.scope.store, where(job.scope, "heldout"))
    reader = Reader(job.saved.model, side, job.device, job.context.check_stop)
    latent_F, row_F = _firings(job, reader, number)
    latent_Q, kind_Q, row_Q = _with_silent(job, side, latent_F, row_F)
    mark_Q = counter_hash(_ORDER, latent_Q, row_Q, kind_Q)
    order = np.lexsort((mark_Q, latent_Q))
    latent_Q, kind_Q, row_Q = latent_Q[order], kind_Q[order], row_Q[order]
    first_Q = np.searchsorted(latent_Q, latent_Q)
    truth_Q = _activations(job, reader, latent_Q, row_Q)
    return Questions(latent_Q, np.arange(len(latent_Q)) - first_Q, kind_Q, row_Q, truth_Q), side


def _firings(job: Job, reader: Reader, number: int) -> tuple[Ints, Ints]:
    """Latent and row of random firings, one a protein, by latent."""
    side = reader.side
    lists = Lists(job.num_latents, torch.tensor([number], device=job.device), distinct=True)
    for batch in reader.batches(0, side.rows):
        row_B = torch.arange(batch.start, batch.start + batch.rows, device=job.device)
        protein_B = side.about(batch.start, batch.start + batch.rows).protein_B.to(job.device)
        key_P = pair_hash(_FIRING, row_B, batch.which_P, batch.latent_P)
        lists.offer(batch.latent_P, key_P, batch.which_P, row_B, protein_B)
        job.context.progress(batch.start, 2 * side.rows, unit="rows")
    entries = lists.entries().cpu()
    return (entries.place_C >> KEY_BITS).numpy(), entries.row_C.numpy()


def _with_silent(job: Job, side: Side, latent_F: Ints, row_F: Ints) -> tuple[Ints, Ints, Ints]:
    """Latent, kind and row of the firings and of what is drawn beside each; no residue twice a latent."""
    cluster_P = clusters_of(job, side)
    member_P = np.argsort(cluster_P, kind="stable")
    first_P = np.searchsorted(cluster_P[member_P], cluster_P)
    size_P = np.searchsorted(cluster_P[member_P], cluster_P, side="right") - first_P
    protein_F = side.protein_of(row_F)
    # One other than the protein itself, where there is one.
    own_F = np.argsort(member_P)[protein_F] - first_P[protein_F]
    others_F = np.maximum(size_P[protein_F] - 1, 1)
    step_F = 1 + (counter_hash(_RELATIVE, latent_F, row_F) % others_F.astype(np.uint64)).astype(np.int64)
    relative_F = member_P[first_P[protein_F] + (own_F + step_F) % size_P[protein_F]]
    length_F = side.length_P[relative_F].astype(np.uint64)
    family_F = side.offset_P[relative_F] + (counter_hash(_RESIDUE, latent_F, row_F) % length_F).astype(np.int64)
    any_F = (counter_hash(_ANY, latent_F, row_F) % np.uint64(side.rows)).astype(np.int64)
    latent = np.tile(latent_F, 3)
    row = np.concatenate([row_F, family_F, any_F])
    kind = np.repeat(np.arange(3), len(row_F))
    _, kept = np.unique(np.stack([latent, row]), axis=1, return_index=True)
    kept.sort()
    return latent[kept], kind[kept], row[kept]


def _activations(job: Job, reader: Reader, latent_Q: Ints, row_Q: Ints) -> npt.NDArray[np.float32]:
    key_Q = torch.from_numpy(row_Q * job.num_latents + latent_Q)
    order_Q = key_Q.argsort()
    sorted_Q = key_Q[order_Q].to(job.device)
    found_Q = torch.zeros(len(key_Q), device=job.device)
    for batch in reader.batches(0, reader.side.rows):
        key_P = (batch.which_P + batch.start) * job.num_latents + batch.latent_P
        place_P = torch.searchsorted(sorted_Q, key_P).clamp(max=max(0, len(sorted_Q) - 1))
        if len(sorted_Q):
            hit_P = sorted_Q[place_P] == key_P
            found_Q[place_P[hit_P]] = batch.act_P[hit_P]
        job.context.progress(reader.side.rows + batch.start, 2 * reader.side.rows, unit="rows")
    truth_Q = torch.zeros(len(key_Q))
    truth_Q[order_Q] = found_Q.cpu()
    result: npt.NDArray[np.float32] = truth_Q.numpy()
    return result


def correlations(latent_Q: Ints, predicted_Q: Any, truth_Q: Any) -> dict[int, tuple[float | None, float | None]]:
    """Pearson's and Spearman's correlation of predicted and true activations by latent; None where either is constant.

    Spearman's is Pearson's of the ranks, equal values sharing their mean rank.
    """
    order = np.argsort(latent_Q, kind="stable")
    names, starts = np.unique(latent_Q[order], return_index=True)
    found = {}
    for latent, mine in zip(names.tolist(), np.split(order, starts[1:]), strict=True):
        pair = predicted_Q[mine].astype(np.float64), truth_Q[mine].astype(np.float64)
        found[latent] = (_pearson(*pair), _pearson(*(_ranks(values) for values in pair)))
    return found


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    ranks: npt.NDArray[np.float64] = (ends - (count - 1) / 2)[place]
    return ranks


def _pearson(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float | None:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else None
