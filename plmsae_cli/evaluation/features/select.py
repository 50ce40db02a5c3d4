"""The first pass: of a piece of the rows, what each list of each latent would hold if there were no other piece."""

from __future__ import annotations

import torch
from torch import Tensor

from plmsae_cli.evaluation.features import layout
from plmsae_cli.evaluation.features.files import write_grouped
from plmsae_cli.evaluation.features.job import LISTS, Job
from plmsae_cli.evaluation.features.ranking import Lists, pair_hash, strength_key
from plmsae_cli.evaluation.features.reading import About, Active, bins_of
from plmsae_cli.evaluation.features.tallies import Tallies, unit
from plmsae_cli.store.fs import FileRecord

SEED = 0


class Selection:
    """Lists and tallies of latents [first, last), fed with batches of active pairs in the order of rows."""

    def __init__(self, first: int, last: int, maximum_N: Tensor, widths_L: Tensor, distinct: bool) -> None:
        device = maximum_N.device
        self.first, self.last = first, last
        self._maximum_N, self._unit_N = maximum_N, unit(maximum_N)
        self.lists = Lists((last - first) * LISTS, widths_L, distinct)
        self.tallies = Tallies(last - first, device, first)

    def add(self, batch: Active, about: About, owner_B: Tensor) -> None:
        """A batch, what is known of its rows, and the owner of each."""
        which_P, latent_P, act_P = batch.which_P, batch.latent_P, batch.act_P
        if (self.first, self.last) != (0, len(self._maximum_N)):
            inside_P = ((latent_P >= self.first) & (latent_P < self.last)).nonzero().squeeze(1)
            which_P, latent_P, act_P = (column.index_select(0, inside_P) for column in (which_P, latent_P, act_P))
        bin_P = bins_of(act_P, self._maximum_N.index_select(0, latent_P))
        share_P = act_P / self._unit_N.index_select(0, latent_P)
        of_rows = (column.index_select(0, which_P) for column in (about.letter_B, about.decile_B, about.length_B))
        self.tallies.add(latent_P, share_P, bin_P, *of_rows)
        row_B = torch.arange(batch.start, batch.start + batch.rows, device=which_P.device)
        list_P = (latent_P - self.first) * LISTS
        self.lists.offer(list_P, strength_key(act_P), which_P, row_B, owner_B)
        key_P = pair_hash(SEED, row_B, which_P, latent_P)
        self.lists.offer(list_P + 1 + bin_P // layout.BINS_PER_BAND, key_P, which_P, row_B, owner_B)


def select(job: Job, index: int, of: int) -> list[FileRecord]:
    """Piece `index` of the rows; one file a pass over them, of the latents whose lists fit the memory together."""
    reader, side = job.reader, job.side
    clusters = job.clusters()
    owner_P = None if clusters is None else torch.from_numpy(clusters.copy())
    start, stop = reader.piece(index, of)
    maximum_N = job.saved.model.maximum_N.to(job.device)
    files = []
    passes = job.passes()
    for number, (first_group, last_group) in enumerate(passes):
        first, last = job.latents_of(first_group, last_group)
        selection = Selection(first, last, maximum_N, job.widths(), job.options.one_per != "token")
        for batch in reader.batches(start, stop):
            about = side.about(batch.start, batch.start + batch.rows)
            owner_B = about.protein_B if owner_P is None else owner_P[about.protein_B]
            selection.add(batch, about.to(job.device), owner_B.to(job.device))
            job.context.progress(
                number * (stop - start) + batch.start - start, len(passes) * (stop - start), unit="rows"
            )
        entries = selection.lists.entries().cpu()
        place_C = entries.place_C + (first * LISTS << 32)
        files.append(
            write_grouped(
                job.scope.store,
                job.path("select", f"{index}of{of}-{number}.safetensors"),
                (place_C >> 32) // (LISTS * job.per_group),
                {"place": place_C, "row": entries.row_C, "owner": entries.owner_C.int()},
                first_group,
                last_group - first_group,
                **{name: count.cpu() for name, count in selection.tallies.count.items()},
            )
        )
    return files
