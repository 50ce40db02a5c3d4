"""Learning rates as pure functions of the step."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int,
    total_steps: int,
    peak: float,
    warmup_steps: int,
    decay_fraction: float,
    final: float = 0.0,
    shape: Literal["linear", "cosine"] = "linear",
) -> float:
    """The rate of step `step`, from 0: warm-up to `peak`, a plateau, a fall towards `final` (a rate too).

    Step s of the linear warm-up takes (s + 1) / (warmup_steps + 1) of the peak. The fall takes the last
    `decay_fraction` of the steps, each a part of peak - final lower than the one before, the last one part
    above `final`, so that no step is spent on a rate of 0. Where the two overlap, the smaller rate holds.
    """
    warm = peak * min(1.0, (step + 1) / (warmup_steps + 1))
    decay_steps = round(decay_fraction * total_steps)
    left = min(1.0, (total_steps - step) / (decay_steps + 1))
    if shape == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return min(warm, final + (peak - final) * left)


def topk_learning_rate(num_latents: int) -> float:
    """Peak rate of a TopK dictionary, 2e-4 / sqrt(N / 2^14) (Gao et al. 2024, appendix A.3 and its code)."""
    return 2e-4 / math.sqrt(num_latents / 2**14)


def sae_learning_rate(optimizer: str, num_latents: int) -> float:
    """Peak rate of a dictionary with this optimiser.

    Muon: 2e-3 at any width, sparsify's, whose updates have the size of ours. Signum: Adam's; sparsify's 5e-3 / sqrt(N / 2^14)
    relies on its averaging of weights: under a warm-up and a fall it left nine latents in ten dead.
    """
    return 2e-3 if optimizer == "muon" else topk_learning_rate(num_latents)


def window(step: int, total_steps: int, start: int | None, longest: int) -> int | None:
    """How far attention sees at step `step`, from 0: `start` places, growing in four equal steps; None is everything.

    The published speed runs grow it in steps of 128; each size is compiled anew, so ours are fewer. The last quarter of the
    steps sees all `longest` tokens.
    """
    if start is None or start >= longest:
        return None
    quarter = min(3, 4 * step // total_steps)
    return None if quarter == 3 else start + (longest - start) * quarter // 3
