"""From raw rows to the encoder's input."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _centre(raw, mean, b_dec, x, square, scale, d: tl.constexpr, D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = 0.0
    for start in range(0, d, D):
        o = start + tl.arange(0, D)
        mask = o < d
        value = (tl.load(raw + row * d + o, mask=mask, other=0.0).to(tl.float32) - tl.load(mean + o, mask=mask)) * scale
        value = tl.where(mask, value, 0.0)
        total += tl.sum(value * value, 0)
        value -= tl.load(b_dec + o, mask=mask, other=0.0)
        tl.store(x + row * d + o, value.to(tl.bfloat16), mask=mask)
    tl.store(square + row, total)


def centre(raw_BD: Tensor, mean_D: Tensor, scale: float, b_dec_D: Tensor, x_BD: Tensor, square_B: Tensor) -> None:
    """x = (raw - mean) * scale - b_dec in bfloat16, and ||(raw - mean) * scale||^2 of each row."""
    rows, d = raw_BD.shape
    assert raw_BD.is_contiguous()
    assert raw_BD.shape == x_BD.shape
    _centre[(rows,)](raw_BD, mean_D, b_dec_D, x_BD, square_B, scale, d, min(1024, triton.next_power_of_2(d)))
