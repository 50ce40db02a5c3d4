"""The active pairs of a batch, as encoders hand them to the rest of a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
