"""What a fused step is given: the tensors it updates, and what is the same in every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Masters:
    """All state of training, updated in place; of what is spread over ranks, this rank's part."""

    parameters: Mapping[str, Tensor]
    """float32, by name; of all but b_dec, the latents in `Rows` alone."""
    moments: Mapping[str, Tensor]
    """Adam's state, `<parameter>.<step | exp_avg | exp_avg_sq>`; averages in float32, or in bfloat16 as in `RoundedAdam`."""
    ages_N: Tensor
    """Global tokens since each latent fired, int64; data parallel, all of them on every rank."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The constants of every batch."""

    rows: int
    """Tokens of a step on this rank."""
    mean_D: Tensor
    scale: float
    """The input is (raw - mean) * scale."""
    window: int
    """Global tokens without firing after which a latent is dead."""


@dataclass(frozen=True)
class AdamOptions:
    """Adam's settings; `max_norm` clips the gradient of the mean over tokens and dimensions, None does not."""

    betas: tuple[float, float]
    eps: float
    max_norm: float | None
