"""What is scored besides the dictionary: codes of the same activations that learnt nothing of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from plmsae_cli.sae.interface import Latents


class Code(Protocol):
    """Activations to non-negative latents."""

    maximum_N: Tensor

    @property
    def num_latents(self) -> int: ...

    def encode(self, x_BD: Tensor) -> Latents: ...


@dataclass
class Directions:
    """2 M signed directions as latents: latent j is max(0, <x - mean, v_j>), latent M + j max(0, -<x - mean, v_j>).

    `basis_DM` has the directions as columns; None are the dimensions themselves. Maxima are those of a sample of training
    rows, as a dictionary's are.
    """

    mean_D: Tensor
    basis_DM: Tensor | None
    maximum_N: Tensor

    @property
    def num_latents(self) -> int:
        return len(self.maximum_N)

    def encode(self, x_BD: Tensor) -> Latents:
        z_BM = _project(x_BD.float(), self.mean_D, self.basis_DM)
        acts_BN = torch.cat([z_BM, -z_BM], dim=1).clamp_(min=0)
        index_N = torch.arange(acts_BN.shape[1], device=acts_BN.device)
        return Latents(acts_BN, index_N.expand(len(acts_BN), -1))

    def to(self, device: torch.device | str) -> Directions:
        basis = None if self.basis_DM is None else self.basis_DM.to(device)
        return Directions(self.mean_D.to(device), basis, self.maximum_N.to(device))


def _project(x_BD: Tensor, mean_D: Tensor, basis_DM: Tensor | None) -> Tensor:
    centred = x_BD - mean_D
    return centred if basis_DM is None else centred @ basis_DM


def residual(sample_RD: Tensor, centred: bool = False) -> Directions:
    """The residual stream's dimensions, both signs, from zero (as published), or from the mean."""
    mean_D = sample_RD.float().mean(0) if centred else torch.zeros(sample_RD.shape[1])
    return _with_maxima(sample_RD, mean_D, None)


def principal(sample_RD: Tensor) -> Directions:
    """The principal components of the sample, both signs, from its mean."""
    x_RD = sample_RD.to(torch.float64, copy=True)
    mean_D = x_RD.mean(0)
    x_RD -= mean_D
    _, vectors_DD = torch.linalg.eigh(x_RD.T @ x_RD)
    # An eigenvector's sign is anybody's choice; both are latents, but their order should not depend on the machine.
    largest_D = vectors_DD.abs().argmax(0)
    vectors_DD = vectors_DD * vectors_DD.gather(0, largest_D[None]).sign()
    return _with_maxima(sample_RD, mean_D.float(), vectors_DD.flip(1).float())


def _with_maxima(sample_RD: Tensor, mean_D: Tensor, basis_DM: Tensor | None) -> Directions:
    z_RM = _project(sample_RD.float(), mean_D, basis_DM)
    return Directions(mean_D, basis_DM, torch.cat([z_RM.amax(0), -z_RM.amin(0)]).clamp(min=0))
