"""The largest activation of each latent in each protein: made by batch, kept in files of bounded size, read by latent.

Letters: P proteins, N latents, n latents of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plmsae_cli.sae.interface import Latents
from plmsae_cli.store.fs import FileRecord, Store, join
from plmsae_cli.store.tensorfile import TensorFile, write_tensors

BLOCK_BYTES = 1 << 28
"""Of one file: what a task holds before it writes, whatever the number of proteins."""


def largest(latents: Latents, maximum_N: Tensor, lengths: Tensor) -> Tensor:
    """Largest activation / maximum [P, N], float16 on the CPU, of whole proteins of these lengths one after the other.

    A latent whose maximum is 0 (it never fired when maxima were taken) keeps its activation as it is.
    """
    device, width = latents.acts_BK.device, len(maximum_N)
    scale_N = torch.where(maximum_N > 0, maximum_N, 1.0)
    owner_R = torch.arange(len(lengths), device=device).repeat_interleave(
        lengths.to(device), output_size=len(latents.acts_BK)
    )
    best = torch.zeros(len(lengths) * width, device=device)
    key_RK = owner_R[:, None] * width + latents.indices_BK
    best.scatter_reduce_(0, key_RK.flatten(), latents.acts_BK.flatten(), "amax")
    return best.view(len(lengths), width).div_(scale_N).half().cpu()


class Writer:
    """`add` proteins; files `<name>-<number>.safetensors` in a folder: `largest` [N, P of the file], `place` of each protein."""

    def __init__(self, store: Store, folder: str, name: str) -> None:
        self._store, self._folder, self._name = store, folder, name
        self._kept: list[Tensor] = []
        self._places: list[int] = []
        self.files: list[FileRecord] = []

    def add(self, places: Sequence[int], best_PN: Tensor) -> None:
        self._kept.append(best_PN)
        self._places += places
        if sum(part.nbytes for part in self._kept) >= BLOCK_BYTES:
            self.close()

    def close(self) -> None:
        """Write what is held."""
        if not self._kept:
            return
        tensors = {"largest": torch.cat(self._kept).T.contiguous(), "place": torch.tensor(self._places)}
        self._kept, self._places = [], []
        path = join(self._folder, f"{self._name}-{len(self.files):05}.safetensors")
        self.files.append(write_tensors(self._store, path, tensors, {}))


class Reader:
    """All pieces as one, a tile of latents at a time, proteins in the order of the whole list."""

    def __init__(self, store: Store, paths: Sequence[str], proteins: int) -> None:
        files = [TensorFile(store, path) for path in paths]
        self._files = [(file, file.read("place")) for file in files]
        self._proteins = proteins

    def tile(self, first: int, last: int) -> Tensor:
        """Latents [first, last): [n, P], float32."""
        acts_nP = torch.zeros(last - first, self._proteins)
        for file, place in self._files:
            acts_nP[:, place] = file.read("largest", first, last).float()
        return acts_nP
