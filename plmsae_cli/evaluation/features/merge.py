"""Of a share of the latents: the lists and tallies of all rows, and what the second pass is to look for.

`merge/<i>of<n>.safetensors` has by latent group `place`, `row` (the lists' entries in order), by latent the tallies, and two
lists for the pieces of the second pass, cut by `pair_offsets` and `sample_offsets`: `pair` (protein x latents + latent,
ascending, each once), whose activations are gathered, and `sample_row`, `sample_latent`, random firings of each latent at
which is looked what fires besides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plmsae_cli.evaluation.features.files import Grouped, runs, share, write_grouped
from plmsae_cli.evaluation.features.job import LISTS, Job
from plmsae_cli.evaluation.features.planning import ENTRY, SAMPLE
from plmsae_cli.evaluation.features.ranking import Entries, first_entries, rank_in_run
from plmsae_cli.evaluation.features.tallies import WIDTHS
from plmsae_cli.store.fs import FileRecord
from plmsae_cli.store.tensorfile import TensorFile

_KEY = (1 << 32) - 1


def merge(job: Job, index: int, of: int, selected: list[str]) -> list[FileRecord]:
    """Share `index` of the latents, from all pieces, given in the order of rows."""
    store = job.scope.store
    first_group, last_group = share(job.groups, index, of)
    first, last = job.latents_of(first_group, last_group)
    candidates = Grouped(store, selected)
    kept: list[Entries] = []
    sizes = candidates.sizes(first_group, last_group)
    for start, stop in runs(sizes, job.buffered(ENTRY), first_group):
        job.context.check_stop()
        columns = (candidates.read(name, start, stop) for name in ("place", "row", "owner"))
        entries = Entries(*(column.long().to(job.device) for column in columns))
        kept.append(first_entries(entries, job.widths(), job.options.one_per != "token").cpu())
        job.context.progress(stop - first_group, last_group - first_group, unit="groups")
    place_C, row_C, _ = (torch.cat(columns) for columns in zip(*kept, strict=True)) if kept else _nothing()
    latent_C = (place_C >> 32) // LISTS
    protein_C = torch.from_numpy(job.side.protein_of(row_C.numpy()))
    sampled_C = _sampled(place_C, latent_C)
    sampled_C = sampled_C[row_C[sampled_C].argsort(stable=True)]
    pair_X = torch.unique(protein_C * job.num_latents + latent_C)
    pieces = [job.side.beginning_in(*job.reader.piece(piece, of)) for piece in range(of)]
    ends = torch.tensor([0, *(high for _, high in pieces)])
    last_rows = torch.tensor([0, *(job.side.rows_of(0, high)[1] for _, high in pieces)])
    return [
        write_grouped(
            store,
            job.path("merge", f"{index}of{of}.safetensors"),
            latent_C // job.per_group,
            {"place": place_C, "row": row_C},
            first_group,
            last_group - first_group,
            pair=pair_X,
            pair_offsets=torch.searchsorted(pair_X, ends * job.num_latents),
            sample_row=row_C[sampled_C],
            sample_latent=latent_C[sampled_C],
            sample_offsets=torch.searchsorted(row_C[sampled_C], last_rows),
            **_tallies(job, selected, first, last),
        )
    ]


def _nothing() -> tuple[Tensor, Tensor, Tensor]:
    empty = torch.empty(0, dtype=torch.int64)
    return empty, empty, empty


def _sampled(place_C: Tensor, latent_C: Tensor) -> Tensor:
    """Which entries are their latent's random firings with the smallest keys, whatever the band."""
    random_C = ((place_C >> 32) % LISTS > 0).nonzero().squeeze(1)
    order_C = random_C[(latent_C[random_C] << 32 | place_C[random_C] & _KEY).argsort(stable=True)]
    return order_C[rank_in_run(latent_C[order_C]) < SAMPLE]


def _tallies(job: Job, selected: list[str], first: int, last: int) -> dict[str, Tensor]:
    """Those of latents [first, last), summed over pieces."""
    total = {name: torch.zeros(last - first, width, dtype=torch.int64) for name, width in WIDTHS.items()}
    for path in selected:
        file = TensorFile(job.scope.store, path)
        start, _ = job.latents_of(int(file.metadata["first_group"]), 0)
        stop = start + file.shape("histogram")[0]
        low, high = max(first, start), min(last, stop)
        if low < high:
            for name, count in total.items():
                count[low - first : high - first] += file.read(name, low - start, high - start)
    return total
