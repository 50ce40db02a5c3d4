"""The largest activations of a batch that is spread over ranks, exactly.

Positive floats rank as their bits do. The bits of the last activation to keep are found digit by digit, each
from a histogram that is summed over ranks: three small messages, whatever the batch. Equal activations are kept
in order of token in the global batch, then of index, so that every world size keeps the same pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plmsae_cli.sae.interface import Reduce

_DIGITS = ((20, 11), (10, 10), (0, 10))  # (lowest bit, number of bits) of each: 31 bits, the sign is always 0


@torch.no_grad()
def keep_largest(
    acts_BN: Tensor, wanted: int, first_row: int, global_rows: int, reduce: Reduce
) -> tuple[Tensor, Tensor]:
    """Which activations (float32, at least 0) are among the `wanted` largest above 0 over all ranks.

    `first_row` is the place of this rank's first token among `global_rows`. Where fewer are above 0, all of those
    are kept. NaN counts as the largest.

    Returns:
        bool [B, N], and the smallest activation kept on any rank, 0 where there is none.
    """
    bits_BN = acts_BN.view(torch.int32) & 0x7FFFFFFF  # drops the sign of -0 and of NaN
    positive = reduce((bits_BN > 0).sum())
    last, spare = nth_largest(bits_BN, positive.clamp(max=wanted), reduce)

    # `spare` of the activations equal to the last: those of the first tokens, and of one token perhaps a part.
    rows = len(acts_BN)
    tied_B = (bits_BN == last).sum(1)
    tied = tied_B.new_zeros(global_rows)
    tied[first_row : first_row + rows] = tied_B
    tied = reduce(tied)
    before_B = (tied.cumsum(0) - tied)[first_row : first_row + rows]
    quota_B = (spare - before_B).clamp(min=0)
    kept_BN = (bits_BN > last) | ((bits_BN == last) & (quota_B >= tied_B).unsqueeze(1))
    row_1 = ((quota_B > 0) & (quota_B < tied_B)).int().argmax().view(1)
    bits_1N = bits_BN.index_select(0, row_1)
    tied_1N = bits_1N == last
    part_1N = (bits_1N > last) | (tied_1N & (tied_1N.cumsum(1) <= quota_B.index_select(0, row_1)))
    kept_BN.index_copy_(0, row_1, part_1N)
    return kept_BN, torch.where(positive > 0, last.view(torch.float32), 0.0)


@torch.no_grad()
def nth_largest(bits: Tensor, n: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """The n-th largest (from 1) of all ranks' int32 values >= 0, and how many of its equals are among the n largest.

    `n` is 0-dim and at most the number of values; for 0 the value is the largest int32.
    """
    found = torch.zeros((), dtype=torch.int32, device=bits.device)
    left = n.long()
    for shift, width in _DIGITS:
        counts = reduce(_histogram((bits >> shift) - (found << width), 1 << width))
        at_or_above = counts.flip(0).cumsum(0).flip(0)
        digit_1 = ((at_or_above >= left).sum() - 1).view(1)
        left = left - (at_or_above - counts).index_select(0, digit_1).squeeze(0)
        found = (found << width) | digit_1.squeeze(0).int()
    return found, left


def _histogram(digits: Tensor, size: int) -> Tensor:
    """int64 [size]: how often each of 0..size - 1 occurs; other values are passed over."""
    if digits.is_cuda:  # bincount would wait for the GPU
        return torch.histc(digits, size, 0, size - 1).long()
    # Counting the others and cutting them off is several times as fast as picking values out.
    return torch.bincount(digits.clamp(-1, size).add_(1).flatten(), minlength=size + 2)[1:-1]
