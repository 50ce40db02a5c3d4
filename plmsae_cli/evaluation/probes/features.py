"""What probes read: latents and activations of residues and of proteins, made by group, kept in files of bounded size.

Of a residue its active latents (activation / maximum) and its activations, of a protein the largest of each latent and the mean
of the activations. Letters: R rows of a kind, N latents, D dimensions of the activations, Q entries that are not zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plmsae_cli.evaluation.probes.logistic import Dense, Sparse
from plmsae_cli.sae.interface import Latents
from plmsae_cli.store.fs import FileRecord, Store, join
from plmsae_cli.store.tensorfile import TensorFile, write_tensors

BLOCK_BYTES = 1 << 28
"""Of one file: what a task holds before it writes, whatever the number of proteins."""
WIDEST, FULL = 4096, 0.125
"""Latents at most, and the share of them active, for which all of them are turned to principal axes: a matrix without zeros."""


def by_residue(latents: Latents, maximum_N: Tensor, x_RD: Tensor) -> dict[str, Tensor]:
    """Rows of a group, numbered from 0: `row`, `latent`, `value` of each entry, `raw` activations; on the CPU."""
    value_RK = (latents.acts_BK / torch.where(maximum_N > 0, maximum_N, 1.0)[latents.indices_BK]).cpu()
    index_RK = latents.indices_BK.cpu()
    row_Q, slot_Q = (value_RK > 0).nonzero(as_tuple=True)
    return {"row": row_Q, "latent": index_RK[row_Q, slot_Q], "value": value_RK[row_Q, slot_Q], "raw": x_RD.cpu()}


def by_protein(residues: dict[str, Tensor], lengths_P: Tensor, num_latents: int) -> dict[str, Tensor]:
    """The same of the group's proteins, of what `by_residue` has of their residues one after the other."""
    owner_R = torch.arange(len(lengths_P)).repeat_interleave(lengths_P)
    best = torch.zeros(len(lengths_P) * num_latents)
    key_Q = owner_R[residues["row"]] * num_latents + residues["latent"]
    best.scatter_reduce_(0, key_Q, residues["value"], "amax")
    best_PN = best.view(len(lengths_P), num_latents)
    row_Q, latent_Q = best_PN.nonzero(as_tuple=True)
    sum_PD = torch.zeros(len(lengths_P), residues["raw"].shape[1], dtype=torch.float64)
    sum_PD.index_add_(0, owner_R, residues["raw"].double())
    mean_PD = (sum_PD / lengths_P[:, None]).float()
    return {"row": row_Q, "latent": latent_Q, "value": best_PN[row_Q, latent_Q], "raw": mean_PD}


class Writer:
    """`add` groups of rows of a kind; files `<kind>-<name>-<number>.safetensors` in a folder."""

    def __init__(self, store: Store, folder: str, kind: str, name: str) -> None:
        self._store, self._folder, self._stem = store, folder, f"{kind}-{name}"
        self._kept: list[dict[str, Tensor]] = []
        self.files: list[FileRecord] = []

    def add(self, first: int, group: dict[str, Tensor]) -> None:
        """`first` is the number of the group's first row among all."""
        assert first + len(group["raw"]) < 2**31
        self._kept.append(
            {
                "row": (group["row"] + first).int(),
                "latent": group["latent"].int(),
                "value": group["value"].float(),
                "raw": group["raw"].float(),
                "place": torch.arange(first, first + len(group["raw"])).int(),
            }
        )
        if sum(tensor.nbytes for one in self._kept for tensor in one.values()) >= BLOCK_BYTES:
            self.close()

    def close(self) -> None:
        """Write what is held."""
        if not self._kept:
            return
        tensors = {name: torch.cat([one[name] for one in self._kept]) for name in self._kept[0]}
        self._kept = []
        path = join(self._folder, f"{self._stem}-{len(self.files):05}.safetensors")
        self.files.append(write_tensors(self._store, path, tensors))


@dataclass(frozen=True)
class Side:
    """Features of the rows that train, or of those that score."""

    latents: Sparse
    together: Sparse | Dense
    """The same for a fit on all of them, perhaps along other axes."""
    raw: Dense
    protein_R: Tensor
    """Of each row, from 0."""


@dataclass(frozen=True)
class Sides:
    """Both, which all targets of a kind share."""

    test_R: Tensor
    train: Side
    test: Side


def read_sides(store: Store, paths: Sequence[str], owner_R: Tensor, test_P: Tensor, num_latents: int) -> Sides:
    """All files of a kind, cut in two; activations have the mean 0, the deviation 1 and the principal axes of train.

    Axes change nothing in a fit with a penalty on the length of its weights but the number of its steps, a tenth of them.

    Args:
        owner_R: each row's protein.
        test_P: bool, the proteins that score.
    """
    files = [TensorFile(store, path) for path in paths]
    row_Q, latent_Q, value_Q = (torch.cat([file.read(name) for file in files]) for name in ("row", "latent", "value"))
    order_Q = row_Q.argsort(stable=True)  # pieces hold every so-many-th group
    latents = Sparse(
        row_Q[order_Q].long(), latent_Q[order_Q].long(), value_Q[order_Q].double(), len(owner_R), num_latents
    )
    raw_RD = torch.empty(len(owner_R), files[0].shape("raw")[1], dtype=torch.float64)
    for file in files:
        raw_RD[file.read("place").long()] = file.read("raw").double()
    test_R = test_P[owner_R]
    train_RD = raw_RD[~test_R]
    mean_D = train_RD.mean(0)
    deviation_D = (train_RD - mean_D).square().mean(0).sqrt()
    unit_D = torch.where(deviation_D > 0, 1 / deviation_D, 0.0)
    scaled_RD = (train_RD - mean_D) * unit_D
    turn_DD = unit_D[:, None] * _axes(scaled_RD)
    parts = latents.some(~test_R), latents.some(test_R)
    together: Sequence[Sparse | Dense] = parts
    if num_latents <= WIDEST and len(latents.value_Q) >= FULL * latents.rows * num_latents:
        train_RN = parts[0].dense()
        axes_NN = _axes(train_RN - train_RN.mean(0))
        together = Dense(train_RN @ axes_NN), Dense(parts[1].dense() @ axes_NN)
    train, test = (
        Side(part, of_all, Dense((raw_RD[keep_R] - mean_D) @ turn_DD), (side_P.cumsum(0) - 1)[owner_R[keep_R]])
        for part, of_all, keep_R, side_P in zip(parts, together, (~test_R, test_R), (~test_P, test_P), strict=True)
    )
    return Sides(test_R, train, test)


def _axes(centred_RD: Tensor) -> Tensor:
    """Principal axes as columns [D, D]."""
    axes_DD: Tensor = torch.linalg.eigh(centred_RD.T @ centred_RD)[1]
    return axes_DD
