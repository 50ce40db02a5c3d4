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
    return (best.view(len(lengths), width) / scale_N).half().cpu()


class Writer:
    """`add` proteins in their order; files `<piece>of<of>-<number>.safetensors` in a folder, [N, P of the file] each."""

    def __init__(self, store: Store, folder: str, piece: int, of: int) -> None:
        self._store, self._folder, self._piece, self._of = store, folder, piece, of
        self._kept: list[Tensor] = []
        self._first = 0
        self.files: list[FileRecord] = []

    def add(self, best_PN: Tensor) -> None:
        self._kept.append(best_PN)
        if sum(part.nbytes for part in self._kept) >= BLOCK_BYTES:
            self.close()

    def close(self) -> None:
        """Write what is held."""
        if not self._kept:
            return
        best_NP = torch.cat(self._kept).T.contiguous()
        self._kept = []
        name = f"{self._piece}of{self._of}-{len(self.files):05}.safetensors"
        place = {"piece": str(self._piece), "of": str(self._of), "first": str(self._first)}
        self.files.append(write_tensors(self._store, join(self._folder, name), {"largest": best_NP}, place))
        self._first += best_NP.shape[1]


class Reader:
    """All pieces as one, a tile of latents at a time, proteins in the order of the whole list."""

    def __init__(self, store: Store, paths: Sequence[str], proteins: int) -> None:
        self._files = [TensorFile(store, path) for path in paths]
        self._proteins = proteins

    def tile(self, first: int, last: int) -> Tensor:
        """Latents [first, last): [n, P], float32."""
        acts_nP = torch.zeros(last - first, self._proteins)
        for file in self._files:
            piece, of, start = (int(file.metadata[key]) for key in ("piece", "of", "first"))
            part_np = file.read("largest", first, last)
            stop = start + part_np.shape[1]
            acts_nP[:, piece + of * start : piece + of * (stop - 1) + 1 : of] = part_np
        return acts_nP
