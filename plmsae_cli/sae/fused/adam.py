"""The update's kernels: clip, projection, Adam, renormalisation and bfloat16 copies of one latent a program; Adam alone."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

import triton
import triton.language as tl


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


@triton.jit
def _adam(
    value,
    average,
    square,
    at,
    index,
    mask,
    gradient,
    rate,
    correction,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    step,
    FIRST: tl.constexpr,
):
    """The new values (the caller stores them); stores the moments. rest = 1 - beta, exactly.

    `index`: the place in the whole tensor, of which there may be a part here; FIRST: salt of the first moment.
    """
    m = beta1 * tl.load(average + at, mask=mask, other=0.0).to(tl.float32) + rest1 * gradient
    v = beta2 * tl.load(square + at, mask=mask, other=0.0).to(tl.float32) + rest2 * gradient * gradient
    _store_moment(average, at, index, m, mask, step, FIRST)
    _store_moment(square, at, index, v, mask, step, FIRST + 1)
    return value - rate * m / (tl.sqrt(v) * correction + eps)


@triton.jit
def update_rows(
    touched,
    enc,
    enc_avg,
    enc_sq,
    enc_copy,
    enc_grad,
    dec,
    dec_avg,
    dec_sq,
    dec_copy,
    dec_grad,
    bias,
    bias_avg,
    bias_sq,
    bias_copy,
    bias_grad,
    centre,
    centre_avg,
    centre_sq,
    centre_grad,
    scalars,
    first,
    n,
    d: tl.constexpr,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    DEC: tl.constexpr,
    ENC: tl.constexpr,
    D: tl.constexpr,
):
    """Latents `first` to `first` + n, which are all that is here: the encoder's rows and biases, or the decoder's and b_dec."""
    latent = tl.program_id(0)
    if tl.load(scalars + 3) > 0:
        rate = tl.load(scalars)
        correction = tl.load(scalars + 1)
        clip = tl.load(scalars + 2)
        step = tl.load(scalars + 4).to(tl.int32)
        o = tl.arange(0, D)
        mask = o < d
        if latent < n:
            fired = mask & (tl.load(touched + latent) > 0)
            at = latent.to(tl.int64) * d + o
            index = (first + latent).to(tl.int64) * d + o
            if DEC:
                row = tl.load(dec + at, mask=mask, other=0.0)
                slope = tl.load(dec_grad + at, mask=fired, other=0.0).to(tl.float32)
                slope = (slope - tl.sum(slope * row, 0) / tl.sum(row * row, 0) * row) * clip
                row = _adam(
                    row, dec_avg, dec_sq, at, index, mask, slope, rate, correction, beta1, beta2, rest1, rest2, eps,
                    step, 4,
                )  # fmt: skip
                row = row / tl.sqrt(tl.sum(tl.where(mask, row * row, 0.0), 0))
                tl.store(dec + at, row, mask=mask)
                tl.store(dec_copy + at, row.to(tl.bfloat16), mask=mask)
            if ENC:
                row = tl.load(enc + at, mask=mask, other=0.0)
                slope = tl.load(enc_grad + at, mask=fired, other=0.0).to(tl.float32) * clip
                row = _adam(
                    row, enc_avg, enc_sq, at, index, mask, slope, rate, correction, beta1, beta2, rest1, rest2, eps,
                    step, 0,
                )  # fmt: skip
                tl.store(enc + at, row, mask=mask)
                tl.store(enc_copy + at, row.to(tl.bfloat16), mask=mask)

                one = latent + tl.arange(0, 1)
                b = tl.load(bias + one)
                g = tl.load(bias_grad + one) * clip
                b = _adam(
                    b, bias_avg, bias_sq, one, first + one, one < n, g, rate, correction, beta1, beta2, rest1, rest2,
                    eps, step, 2,
                )  # fmt: skip
                tl.store(bias + one, b)
                tl.store(bias_copy + one, b.to(tl.bfloat16))
        elif DEC:
            c = tl.load(centre + o, mask=mask, other=0.0)
            gc = tl.load(centre_grad + o, mask=mask, other=0.0) * clip
            c = _adam(
                c, centre_avg, centre_sq, o, o, mask, gc, rate, correction, beta1, beta2, rest1, rest2, eps, step, 6
            )
            tl.store(centre + o, c, mask=mask)


@triton.jit
def update_flat(
    value,
    average,
    square,
    grad,
    scalars,
    size,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    FIRST: tl.constexpr,
    T: tl.constexpr,
):
    """A parameter without bfloat16 copy and without norm."""
    if tl.load(scalars + 3) > 0:
        o = tl.program_id(0) * T + tl.arange(0, T)
        mask = o < size
        w = tl.load(value + o, mask=mask, other=0.0)
        slope = tl.load(grad + o, mask=mask, other=0.0) * tl.load(scalars + 2)
        w = _adam(
            w, average, square, o, o, mask, slope, tl.load(scalars), tl.load(scalars + 1), beta1, beta2, rest1, rest2,
            eps, tl.load(scalars + 4).to(tl.int32), FIRST,
        )  # fmt: skip
        tl.store(value + o, w, mask=mask)
