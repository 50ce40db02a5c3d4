"""The active pairs of a batch, as encoders hand them to the rest of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Written(NamedTuple):
    """Where kernels write pairs, as in `ActivePairs`: pointers, and the shift."""

    acts_P: Tensor
    indices_P: Tensor
    sort_keys_P: Tensor
    shift: int
    token_P: Tensor | None


@dataclass(frozen=True)
class ActivePairs:
    """P places for pairs of a token and a latent, by token, then by latent; the same tensors at every step.

    Either every token has P / B of them (those without activation hold 0), or token b has those from `offsets_B1`[b]
    to `offsets_B1`[b + 1], and what follows the last is void.
    """

    acts_P: Tensor
    """float32, with values that bfloat16 holds."""
    indices_P: Tensor
    """int32."""
    sort_keys_P: Tensor
    """The latent, or N where there is no activation, less `shift`: in 16 bits where they suffice, as sorting takes half
    the passes then."""
    shift: int
    offsets_B1: Tensor | None = None
    """int32."""
    token_P: Tensor | None = None
    """int32; with `offsets_B1`."""

    @property
    def written(self) -> Written:
        return Written(self.acts_P, self.indices_P, self.sort_keys_P, self.shift, self.token_P)

    @classmethod
    def places(cls, pairs: int, num_latents: int, device: torch.device, tokens: int | None = None) -> ActivePairs:
        """Room for so many pairs; with `tokens`, of which each has as many as it will."""

        def numbers(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        short = num_latents < 2**16
        return cls(
            numbers(pairs, torch.float32),
            numbers(pairs),
            numbers(pairs, torch.int16 if short else torch.int32),
            2**15 if short else 0,
            None if tokens is None else numbers(tokens + 1),
            None if tokens is None else numbers(pairs),
        )
