"""The counting task: one piece of the proteins through all codes, its counts on disk.

Memory: at most `memory` bytes of counts, and one group of proteins. The dictionary of 20,480 latents on 500 concepts, half of
them with instance recall, takes 20480 x 750 x 5 x 8 B x 2 halves = 1.2 GB, one of 40,960 latents 2.5 GB; codes that do not fit
together are counted one after the other, latents of one code in tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plmsae_cli.evaluation.concepts.counts import THRESHOLDS, Counts
from plmsae_cli.evaluation.concepts.prepared import AXIS, Prepared
from plmsae_cli.evaluation.concepts.sources import Source, read
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.runtime.task import Context
from plmsae_cli.store.fs import FileRecord, join
from plmsae_cli.store.tensorfile import TensorFile, write_tensors


@dataclass(frozen=True)
class Tile:
    """Latents [first, first + size) of a source, counted together."""

    source: Source
    first: int
    size: int


def passes(sources: Sequence[Source], num_concepts: int, num_instance: int, memory: int) -> list[list[Tile]]:
    """Which tiles are counted in which reading of the proteins, so that no reading's counts exceed `memory`.

    A tile has at least one latent, whatever the memory.
    """
    a_latent = 2 * Counts.bytes(1, num_concepts, num_instance)
    room = max(1, memory // a_latent)
    found: list[list[Tile]] = [[]]
    used = 0
    for source in sources:
        first = 0
        while first < source.code.num_latents:
            if used >= room:
                found.append([])
                used = 0
            size = min(room - used, source.code.num_latents - first)
            found[-1].append(Tile(source, first, size))
            first, used = first + size, used + size
    return found


def count(
    scope: Scope, prepared: Prepared, sources: list[Source], index: int, of: int, memory: int, context: Context
) -> list[FileRecord]:
    """Count piece `index` of `of` and write `counts/<source>-<tile>-<piece>.safetensors`."""
    files: list[FileRecord] = []
    num_concepts = len(prepared.concepts)
    num_instance = sum(not concept.by_residue for concept in prepared.concepts)
    readings = passes(sources, num_concepts, num_instance, memory)
    numbers: dict[str, int] = {}
    for reading, tiles in enumerate(readings):
        counted: dict[Tile, list[Counts]] = {}
        for half in (0, 1):
            for tile, counts in zip(
                tiles,
                _half(prepared, tiles, half, index, of, context, (2 * reading + half, 2 * len(readings))),
                strict=True,
            ):
                counted.setdefault(tile, []).append(counts)
        for tile, both in counted.items():
            name = tile.source.name
            numbers[name] = numbers.get(name, -1) + 1
            path = scope.path(AXIS, "counts", f"{name}-{numbers[name]}-{index}of{of}.safetensors")
            files.append(_write(scope, path, both, tile))
    return files


def _half(
    prepared: Prepared, tiles: Sequence[Tile], half: int, index: int, of: int, context: Context, at: tuple[int, int]
) -> list[Counts]:
    sources = list(dict.fromkeys(tile.source for tile in tiles))
    device = sources[0].rows.device
    num_instance = sum(not concept.by_residue for concept in prepared.concepts)
    counted = [Counts(tile.size, len(prepared.concepts), num_instance, device, tile.first) for tile in tiles]
    mine = prepared.half(half)

    def progress(done: float, total: float) -> None:
        context.progress(at[0] + done / total, at[1])

    for _, source, latents, labels in read(prepared.labelled, sources, mine, index, of, context.check_stop, progress):
        for tile, counts in zip(tiles, counted, strict=True):
            if tile.source is source:
                counts.add(latents, source.code.maximum_N, labels)
    return [counts.at_least() for counts in counted]


def _write(scope: Scope, path: str, both: Sequence[Counts], tile: Tile) -> FileRecord:
    """Counts of the pairs that ever meet, ordered by pair, and `fired` [H, N, T].

    `concept`, `latent`, `hits` [Q, H, T]; of concepts with instance recall `instance_concept`, `instance_latent`, `found`.
    """
    some_CN = torch.stack([counts.hits_CNT[..., 0] for counts in both]).sum(0) > 0
    concept_Q, latent_Q = some_CN.nonzero(as_tuple=True)
    hits = torch.stack([counts.hits_CNT[concept_Q, latent_Q] for counts in both], 1)
    fired = torch.stack([counts.fired_NT for counts in both])
    instances = [counts.instances_CNT for counts in both]
    tensors = {
        "concept": concept_Q.int(),
        "latent": (latent_Q + tile.first).int(),
        "hits": hits.int(),
        "fired": fired,
    }
    rows_I, latent_I, _ = (torch.stack([one[..., :1] for one in instances]).sum(0) > 0).nonzero(as_tuple=True)
    tensors["instance_concept"] = rows_I.int()
    tensors["instance_latent"] = (latent_I + tile.first).int()
    tensors["found"] = torch.stack([one[rows_I, latent_I] for one in instances], 1).int()
    assert int(hits.max() if hits.numel() else 0) < 1 << 31
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    return write_tensors(scope.store, path, stored, {"first": str(tile.first), "size": str(tile.size)})


class Merged:
    """The counts of one source, summed over pieces, read a range of concepts at a time."""

    def __init__(self, scope: Scope, names: Sequence[str], num_latents: int, by_residue: Sequence[bool]) -> None:
        """`names`: the source's files, relative to the run's folder."""
        self._files = [TensorFile(scope.store, join(scope.folder, name)) for name in sorted(names)]
        self._by_residue = list(by_residue)
        self.num_latents = num_latents
        self._keys = [
            {key: file.read(key) for key in ("concept", "instance_concept", "latent", "instance_latent")}
            for file in self._files
        ]
        self.fired_HNT = torch.zeros(2, num_latents, len(THRESHOLDS), dtype=torch.int64)
        for file in self._files:
            first = int(file.metadata["first"])
            self.fired_HNT[:, first : first + int(file.metadata["size"])] += file.read("fired")

    def chunks(self, memory: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first concept, hits, found) of consecutive concepts, [Cc, H, N, T] int64, about `memory` bytes a time."""
        count = len(self._by_residue)
        step = max(1, memory // (2 * 2 * 8 * self.num_latents * len(THRESHOLDS)))
        rank = [sum(not r for r in self._by_residue[:c]) for c in range(count + 1)]
        for first in range(0, count, step):
            last = min(first + step, count)
            hits = self._sum("concept", "latent", "hits", first, last)
            by_instance = self._sum("instance_concept", "instance_latent", "found", rank[first], rank[last])
            found = hits.clone()
            for offset in range(last - first):
                if not self._by_residue[first + offset]:
                    found[offset] = by_instance[rank[first + offset] - rank[first]]
            yield first, hits, found

    def _sum(self, concept: str, latent: str, values: str, first: int, last: int) -> Tensor:
        out = torch.zeros((last - first) * self.num_latents, 2, len(THRESHOLDS), dtype=torch.int64)
        for file, keys in zip(self._files, self._keys, strict=True):
            start, stop = torch.searchsorted(keys[concept], torch.tensor([first, last], dtype=torch.int32)).tolist()
            if stop > start:
                place_Q = (keys[concept][start:stop].long() - first) * self.num_latents + keys[latent][
                    start:stop
                ].long()
                out.index_add_(0, place_Q, file.read(values, start, stop).long())
        return out.view(last - first, self.num_latents, 2, len(THRESHOLDS)).transpose(1, 2).contiguous()
