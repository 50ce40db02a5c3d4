"""The second pass: activations of the chosen latents along the proteins of their examples, and what fires beside them.

A piece has the proteins that begin in its rows. `gather/<i>of<n>-<part>.safetensors` has by latent group `latent`,
`protein`, `position` (from 1), `act`; `beside/...` has `latent` and `other`, a pair for every latent active at a sampled
firing of the first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from plmsae_cli.evaluation.features.files import write_grouped
from plmsae_cli.evaluation.features.job import Job
from plmsae_cli.evaluation.features.reading import About, Active
from plmsae_cli.store.fs import FileRecord
from plmsae_cli.store.tensorfile import TensorFile

INT = torch.int32
_SLOTS = 1 << 26
"""Of a table that says whether a protein and a latent are looked for together."""
_ENTRY = 40
"""Bytes of a found activation while it waits."""


class Found:
    """Columns that grow until the memory is full; then they are a file, sorted by latent, else in the order they came."""

    def __init__(self, job: Job, folder: str, stem: str, columns: Mapping[str, torch.dtype]) -> None:
        self._job, self._folder, self._stem, self._types = job, folder, stem, columns
        self._clear()
        self.files: list[FileRecord] = []

    def _clear(self) -> None:
        self._parts = [tuple(torch.empty(0, dtype=dtype) for dtype in self._types.values())]
        self._count = 0

    def add(self, *columns: Tensor) -> None:
        self._parts.append(tuple(c.cpu().to(t) for c, t in zip(columns, self._types.values(), strict=True)))
        self._count += len(columns[0])
        if self._count >= self._job.buffered(_ENTRY):
            self.write()

    def write(self) -> None:
        job = self._job
        columns = [torch.cat(parts) for parts in zip(*self._parts, strict=True)]
        order = columns[0].argsort(stable=True)
        tensors = {name: column[order] for name, column in zip(self._types, columns, strict=True)}
        path = job.path(self._folder, f"{self._stem}-{len(self.files):04}.safetensors")
        self.files.append(
            write_grouped(job.scope.store, path, tensors["latent"] // job.per_group, tensors, 0, job.groups)
        )
        self._clear()


def gather(job: Job, index: int, of: int, merged: list[str]) -> list[FileRecord]:
    """Piece `index`: the files of both folders."""
    reader, side = job.reader, job.side
    start, stop = side.rows_of(*side.beginning_in(*reader.piece(index, of)))
    merges = [TensorFile(job.scope.store, path) for path in merged]
    pair_X = torch.cat([_of_piece(file, "pair", "pair_offsets", index) for file in merges]).sort().values
    row_S, latent_S = (
        torch.cat([_of_piece(file, name, "sample_offsets", index) for file in merges])
        for name in ("sample_row", "sample_latent")
    )
    order_S = row_S.argsort(stable=True)
    pair_X, row_S, latent_S = (column.to(job.device) for column in (pair_X, row_S[order_S], latent_S[order_S]))
    stem = f"{index}of{of}"
    along = Found(job, "gather", stem, {"latent": INT, "protein": INT, "position": INT, "act": torch.float32})
    beside = Found(job, "beside", stem, {"latent": INT, "other": INT})
    for batch in reader.batches(start, stop):
        about = side.about(batch.start, batch.start + batch.rows).to(job.device)
        along.add(*fires_along(batch, about, pair_X, job.num_latents))
        beside.add(*fires_beside(batch, row_S, latent_S))
        job.context.progress(batch.start - start, max(1, stop - start), unit="rows")
    for found in (along, beside):
        found.write()
    return along.files + beside.files


def _of_piece(file: TensorFile, name: str, offsets: str, index: int) -> Tensor:
    start, stop = file.read(offsets, index, index + 2).tolist()
    return file.read(name, start, stop)


def fires_along(batch: Active, about: About, pair_X: Tensor, num_latents: int) -> tuple[Tensor, ...]:
    """Latent, protein, position and activation of the pairs of the batch that are looked for.

    Args:
        pair_X: protein x num_latents + latent, ascending.
    """
    ends = torch.stack([about.protein_B[0], about.protein_B[-1] + 1])
    places = torch.searchsorted(pair_X, ends * num_latents)
    first, last, low, high = torch.cat([ends, places]).tolist()
    local_X = pair_X[low:high]
    if not len(local_X):
        empty = batch.latent_P[:0]
        return empty, empty, empty, batch.act_P[:0]
    key_P = ((about.protein_B - first) * num_latents).index_select(0, batch.which_P) + batch.latent_P
    wanted_X = local_X - first * num_latents
    pairs = (last - first) * num_latents
    slots = min(pairs, _SLOTS)
    asked = torch.zeros(slots, dtype=torch.bool, device=pair_X.device)
    asked[wanted_X if pairs == slots else wanted_X % slots] = True
    hit_H = asked.index_select(0, key_P if pairs == slots else key_P % slots).nonzero().squeeze(1)
    if pairs > slots:  # some share a slot with one that is asked for
        key_H = key_P.index_select(0, hit_H)
        place_H = torch.searchsorted(wanted_X, key_H).clamp(max=len(wanted_X) - 1)
        hit_H = hit_H.index_select(0, (wanted_X.index_select(0, place_H) == key_H).nonzero().squeeze(1))
    which_H = batch.which_P.index_select(0, hit_H)
    rows = (column.index_select(0, which_H) for column in (about.protein_B, about.position_B))
    return batch.latent_P.index_select(0, hit_H), *rows, batch.act_P.index_select(0, hit_H)


def fires_beside(batch: Active, row_S: Tensor, latent_S: Tensor) -> tuple[Tensor, Tensor]:
    """(latent, other) for each sampled firing (row, latent) in the batch and each other latent active on the row."""
    ends = torch.tensor([batch.start, batch.start + batch.rows], device=row_S.device)
    low, high = torch.searchsorted(row_S, ends).tolist()
    which_S, mine_S = row_S[low:high] - batch.start, latent_S[low:high]
    ends_B1 = torch.searchsorted(batch.which_P, torch.arange(batch.rows + 1, device=row_S.device))
    first_S = ends_B1[which_S]
    count_S = ends_B1[which_S + 1] - first_S
    sample_X = torch.arange(len(mine_S), device=row_S.device).repeat_interleave(count_S)
    latent_X = mine_S.index_select(0, sample_X)
    before_S = count_S.cumsum(0) - count_S
    place_X = torch.arange(len(sample_X), device=row_S.device) + (first_S - before_S).index_select(0, sample_X)
    other_X = batch.latent_P.index_select(0, place_X)
    differ_X = (other_X != latent_X).nonzero().squeeze(1)
    return latent_X.index_select(0, differ_X), other_X.index_select(0, differ_X)
