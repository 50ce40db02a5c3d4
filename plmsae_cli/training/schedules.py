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


TURN_OF_A_RUN, TURN_OF_A_STEP = 10.0, 0.02
"""How far a row may turn, in radians: what a run must allow it, and what a step must not exceed (docs/design.md)."""


def topk_learning_rate(num_latents: int) -> float:
    """Peak rate of a long run of a TopK dictionary, 2e-4 / sqrt(N / 2^14) (Gao et al. 2024, appendix A.3 and its code)."""
    return 2e-4 / math.sqrt(num_latents / 2**14)


def turning_rate(d: int, total_steps: int) -> float:
    """Least peak rate with Adam at which a run of T steps turns rows far enough: min(10 / T, .02) / sqrt(d).

    Adam moves a weight by up to the rate in a step, and the weights of a unit row are 1 / sqrt(d) in size: the row turns
    by up to rate * sqrt(d) radians. Gao et al.'s rate is for runs in which that adds up to dozens.
    """
    return min(TURN_OF_A_RUN / total_steps, TURN_OF_A_STEP) / math.sqrt(d)


def sae_learning_rate(optimizer: str, num_latents: int, d: int, total_steps: int) -> float:
    """Peak rate of a dictionary of `num_latents` latents for activations of dimension d, with this optimiser.

    Adam: Gao et al.'s, in short runs `turning_rate`. Muon: 2e-3 at any width, sparsify's, whose updates have the size of ours.
    Signum: Gao et al.'s; every weight moves by all of it, whatever its gradient's noise. sparsify's 5e-3 / sqrt(N / 2^14)
    relies on its averaging of weights: under a warm-up and a fall it left nine latents in ten dead.
    """
    if optimizer == "muon":
        return 2e-3
    long = topk_learning_rate(num_latents)
    return max(long, turning_rate(d, total_steps)) if optimizer == "adam" else long


def window(step: int, total_steps: int, start: int | None, longest: int) -> int | None:
    """How far attention sees at step `step`, from 0: `start` places, growing in four equal steps; None is everything.

    The published speed runs grow it in steps of 128; each size is compiled anew, so ours are fewer. The last quarter of the
    steps sees all `longest` tokens.
    """
    if start is None or start >= longest:
        return None
    quarter = min(3, 4 * step // total_steps)
    return None if quarter == 3 else start + (longest - start) * quarter // 3
