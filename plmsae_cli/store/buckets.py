"""Reading shuffled map files: any range of places is one contiguous segment of each file."""

from __future__ import annotations

import torch

from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.tensorfile import TensorFile


class Buckets:
    """The map files of one shuffle artifact.

    Each holds `rows` [R, d] sorted by `places` [R] and `offsets` [buckets + 1]: bucket b, the places
    [b * bucket_rows, (b + 1) * bucket_rows), is rows [offsets[b], offsets[b + 1]).
    """

    def __init__(self, store: Store, folder: str, names: list[str], bucket_rows: int) -> None:
        self.files = [TensorFile(store, join(folder, name)) for name in sorted(names)]
        self.bucket_rows = bucket_rows
        self.offsets = [file.read("offsets") for file in self.files]

    @property
    def d(self) -> int:
        return self.files[0].shape("rows")[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.files[0].dtype("rows")

    def gather(self, start: int, out_RD: torch.Tensor) -> None:
        """Fill `out_RD` with the rows whose places are [start, start + R).

        Raises:
            ValueError: the files do not hold each of these places exactly once.
        """
        stop = start + out_RD.shape[0]
        filled = 0
        for file, offsets in zip(self.files, self.offsets, strict=True):
            first = int(offsets[start // self.bucket_rows])
            last = int(offsets[-(-stop // self.bucket_rows)])
            if first == last:
                continue
            places_R = file.read("places", first, last)
            low, high = (int(v) for v in torch.searchsorted(places_R, torch.tensor([start, stop])))
            if low == high:
                continue
            out_RD[places_R[low:high] - start] = file.read("rows", first + low, first + high)
            filled += high - low
        if filled != out_RD.shape[0]:
            raise ValueError(f"places {start} to {stop}: {filled} of {out_RD.shape[0]} rows found")
