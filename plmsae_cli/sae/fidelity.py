"""How well a dictionary reconstructs, streamed over any number of batches and ranks.

Everything kept is a count, a sum in float64 or a maximum, so the result depends neither on how tokens were
split into batches nor on how batches were split over ranks.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plmsae_cli.sae.interface import Latents

# A token's own FVU falls into bins of 1/128 octave from 2^-20 to 2^12: its median is known to 0.3 %.
_BINS_AN_OCTAVE = 128
_LOWEST_OCTAVE, _HIGHEST_OCTAVE = -20, 12
_RATIO_BINS = (_HIGHEST_OCTAVE - _LOWEST_OCTAVE) * _BINS_AN_OCTAVE
_SCALARS = ("tokens", "error", "variance", "cosine")


class State(NamedTuple):
    """What ranks exchange: all-reduce the first with SUM, the second with MAX."""

    sums: Tensor
    """float64, flat; counts are exact up to 2^53."""
    maximum_N: Tensor
    """float32."""


class Fidelity:
    """Sums for FVU, cosine, L0 and firing: `update` by batch, `merge` or reduce `state` by rank, `result`."""

    def __init__(self, num_latents: int, device: torch.device | str = "cpu") -> None:
        self.num_latents = num_latents
        lengths = [len(_SCALARS), _RATIO_BINS, num_latents + 1, num_latents]
        self._sums = torch.zeros(sum(lengths), dtype=torch.float64, device=device)
        self._scalars, self._ratios, self._l0, self.firing_N = torch.split(self._sums, lengths)
        self.maximum_N = torch.zeros(num_latents, device=device)

    @torch.no_grad()
    def update(self, x_BD: Tensor, xhat_BD: Tensor, latents: Latents, mean_D: Tensor) -> Tensor:
        """Count a batch. `mean_D`: the data set's mean in the unit of `x_BD` (0 for a standardised input).

        Returns each row's 1, squared error, squared distance from the mean, cosine and L0: [5, B], float64.
        """
        x_BD, xhat_BD = x_BD.double(), xhat_BD.double()
        error_B = (x_BD - xhat_BD).square().sum(1)
        variance_B = (x_BD - mean_D.double()).square().sum(1)
        cosine_B = torch.cosine_similarity(x_BD, xhat_BD, dim=1)
        figures = [torch.ones_like(error_B), error_B, variance_B, cosine_B]
        self._scalars += torch.stack([figure_B.sum() for figure_B in figures])

        octave_B = torch.log2(error_B / variance_B).nan_to_num(nan=0.0)
        bin_B = ((octave_B - _LOWEST_OCTAVE) * _BINS_AN_OCTAVE).clamp(0, _RATIO_BINS - 1).long()
        self._ratios += _counts(bin_B, _RATIO_BINS)

        active_BK = latents.acts_BK > 0
        l0_B = active_BK.sum(1)
        self._l0 += _counts(l0_B, self.num_latents + 1)
        place_P = torch.where(active_BK, latents.indices_BK, self.num_latents).flatten()
        self.firing_N += _counts(place_P, self.num_latents + 1)[:-1]
        self.maximum_N.scatter_reduce_(0, latents.indices_BK.flatten(), latents.acts_BK.float().flatten(), "amax")
        return torch.stack([*figures, l0_B.double()])

    def merge(self, other: Fidelity) -> None:
        """Count all that `other` counted as well."""
        self._sums += other._sums
        torch.maximum(self.maximum_N, other.maximum_N, out=self.maximum_N)

    def state(self) -> State:
        """The sums and maxima themselves, not copies: reducing them in place reduces this object."""
        return State(self._sums, self.maximum_N)

    def result(self) -> dict[str, Any]:
        """JSON-able figures.

        `fvu`: sum ||x - xhat||^2 / sum ||x - mean||^2; `fvu_median`: the median token's own ratio, to 0.3 %;
        `mse`: ||x - xhat||^2 a token; `cosine` of x and xhat, mean over tokens; `l0_mean`, `l0_deciles`
        (minimum, nine deciles, maximum); `dead_share`: latents that never fired on these `tokens`;
        `density_histogram`: number of latents by decade of firing share, `"-3"` for [1e-3, 1e-2), `"never"`
        for none.
        """
        tokens, error, variance, cosine = self._scalars.tolist()
        assert tokens > 0, "nothing was counted"
        l0 = torch.arange(self.num_latents + 1, dtype=torch.float64, device=self._l0.device)
        median_bin = _quantile(self._ratios, 0.5)
        fired_N = self.firing_N[self.firing_N > 0]
        decades = Counter(torch.log10(fired_N / tokens).floor().long().tolist())
        never = self.num_latents - len(fired_N)
        return {
            "tokens": int(tokens),
            "fvu": error / variance,
            "fvu_median": 2.0 ** (_LOWEST_OCTAVE + (median_bin + 0.5) / _BINS_AN_OCTAVE),
            "mse": error / tokens,
            "cosine": cosine / tokens,
            "l0_mean": float(self._l0 @ l0) / tokens,
            "l0_deciles": [_quantile(self._l0, tenth / 10) for tenth in range(11)],
            "dead_share": never / self.num_latents,
            "density_histogram": {
                "never": never,
                **{str(decade): decades[decade] for decade in sorted(decades)},
            },
        }


def _counts(place: Tensor, length: int) -> Tensor:
    ones = torch.ones(1, dtype=torch.float64, device=place.device).expand(place.shape[0])
    return torch.zeros(length, dtype=torch.float64, device=place.device).index_add_(0, place, ones)


def _quantile(counts: Tensor, share: float) -> int:
    """The smallest place with at least `share` of the counts, and at least one, at or below it."""
    cumulative = counts.cumsum(0)
    wanted = (cumulative[-1] * share).ceil().clamp(min=1.0)
    return int(torch.searchsorted(cumulative, wanted))
