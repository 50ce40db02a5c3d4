"""The intermediate files: columns sorted by latent group, so that whoever works on some groups reads these alone.

A file is safetensors with columns of one length, and `offsets` [groups + 1]: group first_group + g has entries offsets[g] to
offsets[g + 1]. Files of one step are given in the order of pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from plmsae_cli.store.fs import FileRecord, Store
from plmsae_cli.store.tensorfile import TensorFile, write_tensors

_FIRST = "first_group"


def write_grouped(
    store: Store, path: str, group_C: Tensor, columns: Mapping[str, Tensor], first: int, groups: int, **more: Tensor
) -> FileRecord:
    """Write columns whose groups, ascending, are `group_C`, out of [first, first + groups); `more` are written as they are."""
    ends = torch.arange(first, first + groups + 1)
    offsets = torch.searchsorted(group_C.cpu(), ends)
    return write_tensors(store, path, {**columns, **more, "offsets": offsets}, {_FIRST: str(first)})


class Grouped:
    """Several such files as one."""

    def __init__(self, store: Store, paths: Sequence[str]) -> None:
        self._files = [TensorFile(store, path) for path in paths]
        self._offsets = [file.read("offsets") for file in self._files]
        self._first = [int(file.metadata[_FIRST]) for file in self._files]

    def sizes(self, start: int, stop: int) -> list[int]:
        """Entries of groups [start, stop) in all files together."""
        total = torch.zeros(stop - start, dtype=torch.int64)
        for first, offsets in zip(self._first, self._offsets, strict=True):
            low, high = max(start, first), min(stop, first + len(offsets) - 1)
            if low < high:
                total[low - start : high - start] += (
                    offsets[low - first + 1 : high - first + 1] - offsets[low - first : high - first]
                )
        return total.tolist()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """A column of groups [start, stop), file after file."""
        parts = []
        for file, first, offsets in zip(self._files, self._first, self._offsets, strict=True):
            low, high = max(start, first), min(stop, first + len(offsets) - 1)
            if low < high:
                parts.append(file.read(name, int(offsets[low - first]), int(offsets[high - first])))
        return torch.cat(parts)


def runs(sizes: Sequence[int], most: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """Consecutive groups, from `start`, together of at most `most` entries where one alone has no more."""
    first, used = 0, 0
    for place, size in enumerate(sizes):
        if place > first and used + size > most:
            yield start + first, start + place
            first, used = place, 0
        used += size
    if sizes:
        yield start + first, start + len(sizes)


def share(total: int, index: int, of: int) -> tuple[int, int]:
    """Part `index` of `of` of [0, total)."""
    return total * index // of, total * (index + 1) // of
