"""Random numbers as a function of counters, on any device: the same for any number of ranks and any grouping of work."""

from __future__ import annotations

import torch
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014), in wrapping signed arithmetic.
_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def uniform(index: Tensor, *keys: int) -> Tensor:
    """float32 in [0, 1) for each int64 index under the given keys (seed, step, purpose)."""
    state = torch.zeros((), dtype=torch.int64, device=index.device)
    for key in keys:
        state = _mix(state + _GAMMA + key)
    return _shift(_mix(state + index * _GAMMA), 40).float() * 2.0**-24
