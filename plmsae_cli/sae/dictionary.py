"""What every architecture of sparse autoencoder offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from plmsae_cli.sae.interface import Latents, Losses, Reduce, one_process


class Dictionary(nn.Module, ABC):
    """A sparse autoencoder; an architecture is a subclass in its own file, entered in `architectures`.

    Parameters are float32, one latent a row; decoder rows have norm 1 unless the architecture says otherwise.
    A step is `loss`, backward, sum of the gradients over ranks, `project_gradients`, clipping, the optimiser,
    `normalize_decoder`.
    """

    maximum_N: Tensor
    """Largest activation of each latent over training rows, 0 where unknown; saved, not trained."""

    def __init__(self, d: int, num_latents: int) -> None:
        super().__init__()
        self.d = d
        self.num_latents = num_latents
        self.w_enc_ND = nn.Parameter(torch.zeros(num_latents, d))
        self.b_enc_N = nn.Parameter(torch.zeros(num_latents))
        self.w_dec_ND = nn.Parameter(torch.zeros(num_latents, d))
        self.b_dec_D = nn.Parameter(torch.zeros(d))
        self.register_buffer("maximum_N", torch.zeros(num_latents))

    @abstractmethod
    def encode(self, x_BD: Tensor) -> Latents:
        """Active latents of `x_BD`."""

    @abstractmethod
    def decode(self, latents: Latents) -> Tensor:
        """Reconstruction [B, D] from active latents."""

    @abstractmethod
    def loss(self, x_BD: Tensor, dead_N: Tensor, global_rows: int, reduce: Reduce = one_process) -> Losses:
        """This rank's share of the loss of a batch of `global_rows` tokens over all ranks.

        `dead_N` (bool, the same on all ranks) marks the latents to revive.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""

    def forward(self, x_BD: Tensor) -> Tensor:
        """Reconstruction of `x_BD`."""
        return self.decode(self.encode(x_BD))

    def encode_dense(self, x_BD: Tensor) -> Tensor:
        """All N latents of `x_BD`, mostly zeros: [B, N]."""
        latents = self.encode(x_BD)
        z_BN = x_BD.new_zeros(x_BD.shape[0], self.num_latents)
        return z_BN.scatter(1, latents.indices_BK, latents.acts_BK)

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Remove what is parallel to its decoder row from each gradient: it would only change the norm."""
        rows_ND, grad_ND = self.w_dec_ND, self.w_dec_ND.grad
        assert grad_ND is not None, "call backward first"
        along_N = torch.linalg.vecdot(grad_ND, rows_ND) / torch.linalg.vecdot(rows_ND, rows_ND)
        grad_ND.addcmul_(rows_ND, along_N.unsqueeze(1), value=-1)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Give each decoder row (one latent) norm 1."""
        self.w_dec_ND.div_(torch.linalg.vector_norm(self.w_dec_ND, dim=1, keepdim=True))

    @torch.no_grad()
    def fold_(self, mean_D: Tensor, scale: float) -> None:
        """From the input (x - mean) * scale to raw activations x, in place; latents then are in raw units."""
        self.b_enc_N.div_(scale)
        self.b_dec_D.div_(scale).add_(mean_D)
        self.maximum_N.div_(scale)
