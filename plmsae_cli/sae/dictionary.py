"""What every architecture of sparse autoencoder offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from plmsae_cli.sae.interface import Latents, Losses, Reduce, one_process
from plmsae_cli.sae.sparse import Pairs, sparse_decode


class Dictionary(nn.Module, ABC):
    """A sparse autoencoder; an architecture is a subclass in its own file, entered in `architectures`.

    Parameters are float32, one latent a row. A step is `schedule`, `loss`, backward, sum of the gradients over
    ranks, `project_gradients`, clipping, the optimiser, `normalize_decoder`.
    """

    maximum_N: Tensor
    """Largest activation of each latent over training rows, 0 where unknown; saved, not trained."""
    unit_rows: bool = True
    """Whether training keeps decoder rows at norm 1; an export has such rows in any case."""
    compiles: bool = False
    """Whether its `loss` is one graph of constant shapes, which a compiler makes faster."""
    first_row: int = 0
    """Place of this rank's first token in the global batch, set by who trains; orders equal activations."""

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
    def loss(self, x_BD: Tensor, dead_N: Tensor, global_rows: int, reduce: Reduce = one_process) -> Losses:
        """This rank's share of the loss of a batch of `global_rows` tokens over all ranks.

        `dead_N` (bool, the same on all ranks) marks the latents to revive.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""

    def decode(self, latents: Latents) -> Tensor:
        """z W_dec + b_dec: [B, D]."""
        pairs = Pairs.of_rows(latents.indices_BK, self.num_latents)
        return sparse_decode(latents.acts_BK.flatten(), self.w_dec_ND, pairs) + self.b_dec_D

    def forward(self, x_BD: Tensor) -> Tensor:
        """Reconstruction of `x_BD`."""
        return self.decode(self.encode(x_BD))

    def encode_dense(self, x_BD: Tensor) -> Tensor:
        """All N latents of `x_BD`, mostly zeros: [B, N]."""
        latents = self.encode(x_BD)
        z_BN = x_BD.new_zeros(x_BD.shape[0], self.num_latents)
        return z_BN.scatter(1, latents.indices_BK, latents.acts_BK)

    def largest(self, x_BD: Tensor) -> Tensor:
        """The largest activation of each latent among these tokens: [N]."""
        latents = self.encode(x_BD)
        largest_N = x_BD.new_zeros(self.num_latents)
        return largest_N.scatter_reduce_(0, latents.indices_BK.flatten(), latents.acts_BK.flatten(), "amax")

    def start_(self, generator: torch.Generator) -> None:
        """Start what only this architecture has, in place, after `initialise` has set the four parameters."""

    def start_latents(self, x_BD: Tensor) -> Latents | None:
        """The k latents active at the start, whatever the length of W_enc's rows; None where that decides which are."""
        return None

    def schedule(self, step: int, total_steps: int) -> None:
        """Set what depends on the step (from 0) and on nothing else, before its `loss`: numbers on the host."""

    def trained(self) -> dict[str, Tensor]:
        """The live tensors that training changes, by name: parameters, and an architecture's own buffers."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def step_bytes(self, rows: int) -> int:
        """About how many bytes a step on `rows` tokens holds at its peak beyond parameters and optimiser."""
        return 3 * rows * self.num_latents * 4

    def flops_per_token(self) -> float:
        """Floating-point operations that a training step needs a token: two products and their three gradients."""
        return 10.0 * self.num_latents * self.d

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Remove what is parallel to its decoder row from each gradient: it would only change the norm."""
        if not self.unit_rows:
            return
        rows_ND, grad_ND = self.w_dec_ND, self.w_dec_ND.grad
        assert grad_ND is not None, "call backward first"
        along_N = torch.linalg.vecdot(grad_ND, rows_ND) / torch.linalg.vecdot(rows_ND, rows_ND)
        grad_ND.addcmul_(rows_ND, along_N.unsqueeze(1), value=-1)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Give each decoder row (one latent) norm 1, where `unit_rows`."""
        if self.unit_rows:
            self.w_dec_ND.div_(torch.linalg.vector_norm(self.w_dec_ND, dim=1, keepdim=True))

    @torch.no_grad()
    def scale_latents_(self, factors_N: Tensor) -> None:
        """Multiply each latent's activations by its factor and divide its decoder row by it, in place."""
        self.w_enc_ND.mul_(factors_N.unsqueeze(1))
        self.b_enc_N.mul_(factors_N)
        self.w_dec_ND.div_(factors_N.unsqueeze(1))
        self.maximum_N.mul_(factors_N)

    @torch.no_grad()
    def fold_(self, mean_D: Tensor, scale: float) -> None:
        """From the input (x - mean) * scale to raw activations x, in place.

        Latents then are in raw units, and free decoder rows get norm 1: their norms go into the encoder.
        """
        if not self.unit_rows:
            norms_N = torch.linalg.vector_norm(self.w_dec_ND, dim=1)
            self.scale_latents_(torch.where(norms_N > 0, norms_N, 1.0))
        self.b_enc_N.div_(scale)
        self.b_dec_D.div_(scale).add_(mean_D)
        self.maximum_N.div_(scale)
