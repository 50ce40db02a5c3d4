"""What passes between dictionaries and everything that trains, scores or exports them.

Letters in names: B tokens, K active latents of a token, P active pairs (token, latent), N latents, D
dimensions of the activations, E experts, M rows of a sample, C rows of a subset. `acts_BK` has shape [B, K].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks; every rank calls it the same number of times."""


def one_process(tensor: Tensor) -> Tensor:
    """The `Reduce` of a single process: the sum over one rank."""
    return tensor


def ramp(step: int, total_steps: int, share: float) -> float:
    """How far a linear rise over the first `share` of a run has come at `step` (from 0), which counts."""
    return min(1.0, (step + 1) / max(1.0, share * total_steps))


class Latents(NamedTuple):
    """The active latents of B tokens; zeros fill up a token with fewer than K."""

    acts_BK: Tensor
    """Activations, at least 0, in the unit of the model's input."""
    indices_BK: Tensor
    """Which latents, int64, distinct within a row."""


class Losses(NamedTuple):
    """One rank's share of a step's loss: the sum over ranks is the loss of the global batch."""

    total: Tensor
    """What to call `backward` on."""
    reconstruction: Tensor
    """Squared error a token and dimension, part of `total`."""
    aux: Tensor
    """The auxiliary term (AuxK, sparsity penalty, load balance) before its coefficient."""
    fired_N: Tensor
    """bool: the latents that fired on this rank's tokens."""
    active_B: Tensor
    """int64: active latents of each of this rank's tokens."""
    xhat_BD: Tensor
    """The full reconstruction, detached."""
