"""The four matrices that all dictionaries have, and the models of ours that they become.

Rows of the decoder get norm 1, the norms going into encoder and latents, as in our own exports. Not so where one
number ranks or cuts all latents (TopK, BatchTopK's theta): scaling latents apart would choose others, so rows stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from plmsae_cli.config.errors import UserError
from plmsae_cli.sae.batch_topk import BatchTopK
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.gated import Gated
from plmsae_cli.sae.jumprelu import JumpReLU
from plmsae_cli.sae.matryoshka import MatryoshkaBatchTopK
from plmsae_cli.sae.relu_l1 import ReLUL1
from plmsae_cli.sae.topk import TopK

D = TypeVar("D", bound=Dictionary)
LEAST_THRESHOLD = torch.finfo(torch.float32).tiny
"""Stands for thresholds at or below 0, which cut no more than a ReLU does."""


@dataclass(frozen=True)
class Matrices:
    """Encoder and decoder, one latent a row.

    Raises:
        UserError: their shapes do not fit each other.
    """

    w_enc_ND: Tensor
    b_enc_N: Tensor
    w_dec_ND: Tensor
    b_dec_D: Tensor
    centred: bool
    """Whether the encoder is given x - b_dec, as ours always is; else x."""

    def __post_init__(self) -> None:
        shapes = [tuple(t.shape) for t in (self.w_enc_ND, self.b_enc_N, self.w_dec_ND, self.b_dec_D)]
        wide = shapes[0]
        if len(wide) != 2 or shapes[1:] != [wide[:1], wide, wide[1:]]:
            raise UserError(
                f"its tensors do not fit each other: encoder {wide}, its bias {shapes[1]}, decoder {shapes[2]}, "
                f"its bias {shapes[3]}",
                "the file is damaged, or of another kind than it looks",
            )

    @property
    def num_latents(self) -> int:
        return self.w_enc_ND.shape[0]

    @property
    def d(self) -> int:
        return self.w_enc_ND.shape[1]

    @property
    def shift_N(self) -> Tensor:
        """What the encoder's bias lacks to be that of x - b_dec: W_enc b_dec, or zeros."""
        if self.centred:
            return torch.zeros(self.num_latents)
        return (self.w_enc_ND.double() @ self.b_dec_D.double()).float()

    def into(self, model: D, more: Mapping[str, Tensor] | None = None, unit_rows: bool = True) -> D:
        """Fill the model, further tensors of it by name; each of these must have its shape."""
        own = {"w_enc_ND": self.w_enc_ND, "w_dec_ND": self.w_dec_ND, "b_dec_D": self.b_dec_D}
        own |= {"b_enc_N": self.b_enc_N.float() + self.shift_N, "maximum_N": model.maximum_N, **(more or {})}
        for name, tensor in model.state_dict().items():
            if tensor.shape != own[name].shape:
                raise UserError(f"its {name} has shape {tuple(own[name].shape)}, not {tuple(tensor.shape)}")
        model.load_state_dict({name: tensor.float() for name, tensor in own.items()})
        if unit_rows:
            norms_N = torch.linalg.vector_norm(model.w_dec_ND.detach(), dim=1)
            model.scale_latents_(torch.where(norms_N > 0, norms_N, 1.0))
        return model

    def relu(self) -> ReLUL1:
        """z = ReLU(a)."""
        return self.into(ReLUL1(self.d, self.num_latents, unit_rows=True))

    def top_k(self, k: int, by_length: bool = False) -> TopK:
        """z = ReLU(TopK_k(a)); with `by_length`, of a times the norm of the decoder's row, which is how SAELens may rank."""
        return self.into(TopK(self.d, self.num_latents, k), unit_rows=by_length)

    def batch_top_k(self, k: int, theta: Tensor, groups: Sequence[int] | None = None) -> BatchTopK:
        """z = a H(a - theta), theta one number; Matryoshka with `groups`, the number of latents of each."""
        theta = theta.float().clamp(min=0)
        if groups is None:
            return self.into(BatchTopK(self.d, self.num_latents, k), {"theta": theta}, unit_rows=False)
        fractions = [size / self.num_latents for size in groups]
        model = MatryoshkaBatchTopK(self.d, self.num_latents, k, fractions=fractions)
        return self.into(model, {"theta": theta}, unit_rows=False)

    def jump_relu(self, theta_N: Tensor) -> JumpReLU:
        """z = a H(a - theta), theta one a latent."""
        log_theta_N = theta_N.float().clamp(min=LEAST_THRESHOLD).log()
        return self.into(JumpReLU(self.d, self.num_latents), {"log_theta_N": log_theta_N})

    def gated(self, r_mag_N: Tensor, b_mag_N: Tensor) -> Gated:
        """z = H(W x + b_gate) ReLU(exp(r) W x + b_mag); `b_enc_N` is b_gate."""
        b_mag_N = b_mag_N.float() + r_mag_N.float().exp() * self.shift_N
        return self.into(Gated(self.d, self.num_latents), {"r_mag_N": r_mag_N, "b_mag_N": b_mag_N})
