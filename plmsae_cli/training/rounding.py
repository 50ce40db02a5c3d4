"""Stochastic rounding of float32 to bfloat16, a function of (step, index, salt) alone.

Rounding to nearest loses every change below half a unit in the last place: an average with decay .999 moves by
a thousandth of the difference, bfloat16 resolves 1/256, so such an average would freeze. Rounding up with
the probability of the part cut off keeps its expectation. As the random bits are a function of counters, runs repeat
and resume bit for bit.

The definition, in unsigned 32-bit arithmetic modulo 2^32 with logical shifts; a kernel must do the same:

    mix(h):     h ^= h >> 16;  h *= 0x7FEB352D;  h ^= h >> 15;  h *= 0x846CA68B;  h ^= h >> 16
    random16:   mix(mix(mix(salt) ^ step) ^ index) >> 16
    rounded:    (bits of x as float32 + random16) & 0xFFFF0000, which are the bits of a bfloat16 and 16 zeros

`index` is the element's place in its tensor, in memory order, modulo 2^32. `mix` is Wellons' lowbias32 (2018).
"""

from __future__ import annotations

import torch
from torch import Tensor

# In int32, whose sums and products wrap to the same bits as those of uint32.
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - 2**32
_UPPER_HALF = 0xFFFF0000 - 2**32


def mix(h: Tensor) -> Tensor:
    """A bijection of int32 in which every bit of the input moves every bit of the output with probability 1/2."""
    h = (h ^ _shift(h, 16)) * _MULTIPLIER_1
    h = (h ^ _shift(h, 15)) * _MULTIPLIER_2
    return h ^ _shift(h, 16)


def random16(index: Tensor, step: Tensor, salt: int) -> Tensor:
    """int32 in 0..65535 for each int32 `index`; `step` is a 0-dim int32 on the same device."""
    salted = mix(torch.full((), salt, dtype=torch.int32, device=index.device))
    return _shift(mix(mix(salted ^ step) ^ index), 16)


def stochastic_bfloat16(x: Tensor, index: Tensor, step: Tensor, salt: int) -> Tensor:
    """float32 `x` to one of its two neighbours in bfloat16, unbiased; exact values and infinities are kept.

    `index` (int32) has the shape of `x`. Finite values above the largest bfloat16 may become infinite.
    """
    bits = (x.view(torch.int32) + random16(index, step, salt)) & _UPPER_HALF
    return bits.view(torch.float32).to(torch.bfloat16)


def _shift(h: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32."""
    return (h >> bits) & ((1 << (32 - bits)) - 1)
