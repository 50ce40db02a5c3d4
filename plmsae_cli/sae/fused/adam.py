"""The update's kernels: clip, projection, Adam, renormalisation and bfloat16 copies of one latent a program; Adam alone."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _mix(h):
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _store_moment(pointer, at, index, value, mask, step, SALT: tl.constexpr):
    """As float32, or in bfloat16 by the stochastic rounding of `training.rounding`."""
    if pointer.dtype.element_ty == tl.bfloat16:
        salted = _mix(_mix(tl.full((1,), SALT, tl.uint32)) ^ step.to(tl.uint32))
        random = _mix(salted ^ index.to(tl.uint32)) >> 16
        bits = (value.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
        value = bits.to(tl.float32, bitcast=True)
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=mask)


class Stored(NamedTuple):
    """A parameter in memory: pointers inside kernels."""

    value: Tensor
    average: Tensor
    square: Tensor
    grad: Tensor
    copy: Tensor | None = None
    """In bfloat16; None where products do not read it."""


class Constants(NamedTuple):
    """Adam's, with rest = 1 - beta, exactly."""

    beta1: float
    beta2: float
    rest1: float
    rest2: float
    eps: float


@triton.jit
def _load_now(scalars):
    """Of this step, as `collect.finish` leaves them: rate, correction, clip, number of updates."""
    return tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2), tl.load(scalars + 4).to(tl.int32)


@triton.jit
def _adam(value, stored, at, index, mask, gradient, now, constants, FIRST: tl.constexpr):
    """The new values (the caller stores them); stores the moments.

    `index`: the place in the whole tensor, of which there may be a part here; FIRST: salt of the first moment.
    """
    rate, correction, clip, step = now
    gradient *= clip
    m = tl.load(stored.average + at, mask=mask, other=0.0).to(tl.float32)
    m = constants.beta1 * m + constants.rest1 * gradient
    v = tl.load(stored.square + at, mask=mask, other=0.0).to(tl.float32)
    v = constants.beta2 * v + constants.rest2 * gradient * gradient
    _store_moment(stored.average, at, index, m, mask, step, FIRST)
    _store_moment(stored.square, at, index, v, mask, step, FIRST + 1)
    return value - rate * m / (tl.sqrt(v) * correction + constants.eps)


@triton.jit
def update_rows(
    touched, enc, dec, bias, centre, scalars, constants, first, n, d: tl.constexpr, DEC: tl.constexpr,
    ENC: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Latents `first` to `first` + n, which are all that is here: the encoder's rows and biases, or the decoder's and b_dec."""
    latent = tl.program_id(0)
    if tl.load(scalars + 3) > 0:
        now = _load_now(scalars)
        o = tl.arange(0, D)
        mask = o < d
        if latent < n:
            fired = mask & (tl.load(touched + latent) > 0)
            at = latent.to(tl.int64) * d + o
            index = (first + latent).to(tl.int64) * d + o
            if DEC:
                row = tl.load(dec.value + at, mask=mask, other=0.0)
                slope = tl.load(dec.grad + at, mask=fired, other=0.0).to(tl.float32)
                slope = slope - tl.sum(slope * row, 0) / tl.sum(row * row, 0) * row
                row = _adam(row, dec, at, index, mask, slope, now, constants, 4)
                row = row / tl.sqrt(tl.sum(tl.where(mask, row * row, 0.0), 0))
                tl.store(dec.value + at, row, mask=mask)
                tl.store(dec.copy + at, row.to(tl.bfloat16), mask=mask)
            if ENC:
                row = tl.load(enc.value + at, mask=mask, other=0.0)
                slope = tl.load(enc.grad + at, mask=fired, other=0.0).to(tl.float32)
                row = _adam(row, enc, at, index, mask, slope, now, constants, 0)
                tl.store(enc.value + at, row, mask=mask)
                tl.store(enc.copy + at, row.to(tl.bfloat16), mask=mask)

                one = latent + tl.arange(0, 1)
                b = tl.load(bias.value + one)
                b = _adam(b, bias, one, first + one, one < n, tl.load(bias.grad + one), now, constants, 2)
                tl.store(bias.value + one, b)
                tl.store(bias.copy + one, b.to(tl.bfloat16))
        elif DEC:
            c = tl.load(centre.value + o, mask=mask, other=0.0)
            slope = tl.load(centre.grad + o, mask=mask, other=0.0)
            c = _adam(c, centre, o, o, mask, slope, now, constants, 6)
            tl.store(centre.value + o, c, mask=mask)


@triton.jit
def update_flat(stored, scalars, constants, size, FIRST: tl.constexpr, T: tl.constexpr):
    """A parameter without bfloat16 copy and without norm."""
    if tl.load(scalars + 3) > 0:
        now = _load_now(scalars)
        o = tl.program_id(0) * T + tl.arange(0, T)
        mask = o < size
        w = tl.load(stored.value + o, mask=mask, other=0.0)
        slope = tl.load(stored.grad + o, mask=mask, other=0.0)
        w = _adam(w, stored, o, o, mask, slope, now, constants, FIRST)
        tl.store(stored.value + o, w, mask=mask)
