"""Pairs of a token and the nested groups of latents that they are in, inside kernels: one group but for a Matryoshka.

Tensor cores multiply at least 16 rows at once: the prefixes are rows of such a tile, and the rest are zeros.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


@triton.jit
def group_of(latent, prefixes, G: tl.constexpr):
    """The smallest prefix that holds the latent."""
    group = latent * 0
    for g in tl.static_range(G - 1):
        group += (latent >= tl.load(prefixes + g)).to(tl.int32)
    return group


@triton.jit
def load_pairs(acts, indices, prefixes, pair, end, G: tl.constexpr):
    """Activations, latents and their groups; 0 from `end` on."""
    act = tl.load(acts + pair, mask=pair < end, other=0.0)
    latent = tl.load(indices + pair, mask=pair < end, other=0)
    return act, latent, group_of(latent, prefixes, G)


@triton.jit
def held_by(prefix, act, group, G: tl.constexpr):
    """Row g: the activations within prefix g, 0 where there is no such prefix. They are bfloat16 already."""
    return tl.where((group[None, :] <= prefix[:, None]) & (prefix[:, None] < G), act[None, :], 0.0).to(tl.bfloat16)


@triton.jit
def of_own_group(slopes, prefix, group):
    """Each pair's slope by the residual of its group."""
    return tl.sum(tl.where(prefix[None, :] == group[:, None], slopes, 0.0), 1)


class Tile(NamedTuple):
    """What one pass over decoder rows takes."""

    pairs: int
    columns: int
    places: int
    """For the groups."""


def tile_of_pairs(pairs: int, groups: int) -> Tile:
    """Of so many pairs, a power of two of 16 or more."""
    return Tile(pairs, max(16, min(64, 4096 // pairs)), max(16, triton.next_power_of_2(groups)))


def pairs_held(k: int) -> int:
    """Places for k pairs: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(k))
