"""Rotary position embedding (Su et al., RoFormer, 2021), half-split form, with fp32 tables.

Shape letters: T tokens, H heads, Dh width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

Tables = tuple[Tensor, Tensor]


def inverse_frequencies(head_dim: int, base: float = 10_000.0) -> Tensor:
    """base^(-2i / Dh) for i < Dh / 2, fp32."""
    return 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


class Rotary(nn.Module):
    """Holds the inverse frequencies as state, because trained weights bring their own.

    ESM-2 was trained in fp16 with frequencies rounded to fp16, and its published files carry those:
    frequencies computed afresh are a slightly different model.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(head_dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A model moved to bf16 keeps these in fp32: rounded once more, cosines are off by more than 1 at
        # position 1000.
        kept = self.inv_freq
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.inv_freq = kept.to(self.inv_freq.device)
        return self

    def forward(self, position_T: Tensor) -> Tables:
        """cos and sin of every position's angles, each fp32 [T, 1, Dh / 2]."""
        # Autocast would compute this product of positions in bf16, which knows no odd number above 256.
        with torch.autocast(position_T.device.type, enabled=False):
            angles = position_T.to(torch.float32)[:, None, None] * self.inv_freq
            return angles.cos(), angles.sin()


def rotate(x_THD: Tensor, tables: Tables) -> Tensor:
    """Turn the pairs (i, i + Dh / 2) of each head by the token's angles; computed in fp32, returned in x's
    dtype."""
    cos, sin = tables
    first, second = x_THD.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_THD.dtype)
