"""What is counted of every latent in the pass over all rows. Integers alone: no order of rows or pieces changes them.

Letters: N latents, P pairs (row, latent), B rows of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plmsae_cli.evaluation.features import layout
from plmsae_cli.evaluation.features.reading import OTHER

WIDTHS = {
    "histogram": layout.HISTOGRAM_BINS,
    "letters": OTHER + 1,
    "deciles": layout.DECILES,
    "length": 1,
    "activation": 1,
}
_UNIT = 1 << 24
_MOST = 1 << 10


class Tallies:
    """Counts of latents [first, first + N): `histogram` [N, 32] of activation / maximum, `letters` [N, 21] and `deciles`
    [N, 10] of the firings, `length` [N, 1], the summed length of the protein, `activation` [N, 1], the sum in units of
    `unit` / 2^24."""

    def __init__(self, num_latents: int, device: torch.device, first: int = 0) -> None:
        self.first = first
        self.count = {
            name: torch.zeros(num_latents, width, dtype=torch.int64, device=device) for name, width in WIDTHS.items()
        }

    def add(
        self, latent_P: Tensor, share_P: Tensor, bin_P: Tensor, letter_P: Tensor, decile_P: Tensor, length_P: Tensor
    ) -> None:
        """Pairs of a batch; `share_P` is the activation in units of `unit_N`."""
        local_P = latent_P - self.first
        one_P = torch.ones_like(local_P)
        for name, column_P in (("histogram", bin_P), ("letters", letter_P), ("deciles", decile_P)):
            place_P = local_P * WIDTHS[name] + column_P
            self.count[name].view(-1).scatter_add_(0, place_P, one_P)
        self.count["length"].view(-1).scatter_add_(0, local_P, length_P)
        fixed_P = (share_P.clamp(max=_MOST).double() * _UNIT).round().long()
        self.count["activation"].view(-1).scatter_add_(0, local_P, fixed_P)


def unit(maximum_N: Tensor) -> Tensor:
    """What activations are summed in: the latent's maximum, or where that is 0 the dictionary's."""
    return torch.where(maximum_N > 0, maximum_N, maximum_N.max().clamp(min=1.0))


def mean_activation(activation_N: Tensor, firing_N: Tensor, maximum_N: Tensor) -> Tensor:
    """Mean where it fires, float64; NaN where it never does."""
    return activation_N.double() / _UNIT * unit(maximum_N).double() / firing_N
