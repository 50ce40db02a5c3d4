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
from plmsae_cli.evaluation.probes.planning import turned
from plmsae_cli.sae.interface import Latents
from plmsae_cli.store.fs import FileRecord, Store, join
from plmsae_cli.store.tensorfile import TensorFile, write_tensors

BLOCK_BYTES = 1 << 28
"""Of one file: what a task holds before it writes, whatever the number of proteins."""
_TURNED = 4096
"""Rows turned at a time."""


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
    test_R = test_P[owner_R]
    raw = _activations(files, test_R)
    latents = _entries(files, len(owner_R), num_latents)
    parts = latents.some(~test_R), latents.some(test_R)
    del latents  # memory is reckoned with that (`planning.held`)
    together: Sequence[Sparse | Dense] = parts
    if turned(parts[0].rows, len(parts[0].value_Q), num_latents):
        train_RN, test_RN = parts[0].dense(), parts[1].dense()
        axes_NN = _axes(train_RN)
        together = Dense(_turn(train_RN, axes_NN)), Dense(_turn(test_RN, axes_NN))
    train, test = (
        Side(part, of_all, Dense(x_RD), (side_P.cumsum(0) - 1)[owner_R[side_P[owner_R]]])
        for part, of_all, x_RD, side_P in zip(parts, together, raw, (~test_P, test_P), strict=True)
    )
    return Sides(test_R, train, test)


def _activations(files: Sequence[TensorFile], test_R: Tensor) -> tuple[Tensor, Tensor]:
    """Of train and of test, standardised and turned."""
    raw_RD = torch.empty(len(test_R), files[0].shape("raw")[1])
    for file in files:
        raw_RD[file.read("place").long()] = file.read("raw")
    train_RD, scored_RD = (raw_RD[keep_R].double() for keep_R in (~test_R, test_R))
    del raw_RD
    mean_D = train_RD.mean(0)
    train_RD -= mean_D
    deviation_D = torch.linalg.vector_norm(train_RD, dim=0) / len(train_RD) ** 0.5
    unit_D = torch.where(deviation_D > 0, 1 / deviation_D, 0.0)
    train_RD *= unit_D
    axes_DD = _axes(train_RD)
    return _turn(train_RD, axes_DD), _turn(scored_RD.sub_(mean_D).mul_(unit_D), axes_DD)


def _entries(files: Sequence[TensorFile], rows: int, num_latents: int) -> Sparse:
    def read(name: str) -> Tensor:
        return torch.cat([file.read(name) for file in files])

    row_Q = read("row")
    order_Q = row_Q.argsort(stable=True)  # pieces hold every so-many-th group
    row_Q = row_Q[order_Q].long()
    return Sparse(row_Q, read("latent")[order_Q].long(), read("value")[order_Q].double(), rows, num_latents)


def _axes(x_RD: Tensor) -> Tensor:
    """Principal axes as columns [D, D]."""
    mean_D = x_RD.mean(0)
    axes_DD: Tensor = torch.linalg.eigh(x_RD.T @ x_RD - len(x_RD) * torch.outer(mean_D, mean_D))[1]
    return axes_DD


def _turn(x_RD: Tensor, axes_DD: Tensor) -> Tensor:
    """`x @ axes` in its own memory."""
    for part_rD in torch.split(x_RD, _TURNED):
        part_rD.copy_(part_rD @ axes_DD)
    return x_RD
