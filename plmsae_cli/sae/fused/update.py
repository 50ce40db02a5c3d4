"""One pass over parameters and moments: clip, projection, Adam, renormalisation, and the bfloat16 copies."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Moments(NamedTuple):
    """Adam's state of one parameter: float32, or bfloat16 with stochastic rounding."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


@triton.jit
def _one_minus_power(t, decay):
    """1 - exp(-decay t), by its series where the difference would lose digits."""
    y = t * decay
    series = y * (1 - y / 2 * (1 - y / 3 * (1 - y / 4 * (1 - y / 5))))
    return tl.where(y < 0.1, series, 1 - tl.exp(-y))


@triton.jit
def _prepare(step, rate, squares, out, max_norm, decay1, decay2, CLIP: tl.constexpr):
    """out = [learning rate / (1 - beta1^t), 1 / sqrt(1 - beta2^t), clip factor, 1 if finite, norm]; t counts on."""
    norm = tl.sqrt(tl.load(squares))
    finite = norm < float("inf")
    t = tl.load(step) + tl.where(finite, 1.0, 0.0)
    tl.store(step, t)
    tl.store(out, tl.load(rate) / _one_minus_power(t, decay1))
    tl.store(out + 1, 1.0 / tl.sqrt(_one_minus_power(t, decay2)))
    if CLIP:
        tl.store(out + 2, 1.0 / tl.maximum(norm / max_norm, 1.0))
    else:
        tl.store(out + 2, 1.0)
    tl.store(out + 3, tl.where(finite, 1.0, 0.0))
    tl.store(out + 4, norm)


@triton.jit
def _adam(parameter, gradient, average, square, rate, correction, beta1, beta2, eps):
    average = beta1 * average + (1 - beta1) * gradient
    square = beta2 * square + (1 - beta2) * gradient * gradient
    return parameter - rate * average / (tl.sqrt(square) * correction + eps), average, square


@triton.jit
def _update_rows(
    counts,
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
    scalars,
    d: tl.constexpr,
    beta1,
    beta2,
    eps,
    D: tl.constexpr,
):
    latent = tl.program_id(0)
    finite = tl.load(scalars + 3)
    if finite > 0:
        rate = tl.load(scalars)
        correction = tl.load(scalars + 1)
        clip = tl.load(scalars + 2)
        fired = tl.load(counts + latent) > 0
        o = tl.arange(0, D)
        mask = o < d
        at = latent.to(tl.int64) * d + o

        value = tl.load(dec + at, mask=mask, other=0.0)
        gradient = tl.load(dec_grad + at, mask=mask & fired, other=0.0).to(tl.float32)
        gradient = (gradient - tl.sum(gradient * value, 0) / tl.sum(value * value, 0) * value) * clip
        average = tl.load(dec_avg + at, mask=mask, other=0.0).to(tl.float32)
        square = tl.load(dec_sq + at, mask=mask, other=0.0).to(tl.float32)
        value, average, square = _adam(value, gradient, average, square, rate, correction, beta1, beta2, eps)
        value = tl.where(mask, value, 0.0)
        value = value / tl.sqrt(tl.sum(value * value, 0))
        tl.store(dec + at, value, mask=mask)
        tl.store(dec_copy + at, value.to(tl.bfloat16), mask=mask)
        tl.store(dec_avg + at, average.to(dec_avg.dtype.element_ty), mask=mask)
        tl.store(dec_sq + at, square.to(dec_sq.dtype.element_ty), mask=mask)

        value = tl.load(enc + at, mask=mask, other=0.0)
        gradient = tl.load(enc_grad + at, mask=mask & fired, other=0.0).to(tl.float32) * clip
        average = tl.load(enc_avg + at, mask=mask, other=0.0).to(tl.float32)
        square = tl.load(enc_sq + at, mask=mask, other=0.0).to(tl.float32)
        value, average, square = _adam(value, gradient, average, square, rate, correction, beta1, beta2, eps)
        tl.store(enc + at, value, mask=mask)
        tl.store(enc_copy + at, value.to(tl.bfloat16), mask=mask)
        tl.store(enc_avg + at, average.to(enc_avg.dtype.element_ty), mask=mask)
        tl.store(enc_sq + at, square.to(enc_sq.dtype.element_ty), mask=mask)

        g = tl.load(bias_grad + latent) * clip
        b, a, s = _adam(
            tl.load(bias + latent),
            g,
            tl.load(bias_avg + latent),
            tl.load(bias_sq + latent),
            rate,
            correction,
            beta1,
            beta2,
            eps,
        )
        tl.store(bias + latent, b)
        tl.store(bias_copy + latent, b.to(tl.bfloat16))
        tl.store(bias_avg + latent, a)
        tl.store(bias_sq + latent, s)


@triton.jit
def _update_vector(value, avg, sq, grad, scalars, d: tl.constexpr, beta1, beta2, eps, D: tl.constexpr):
    if tl.load(scalars + 3) > 0:
        o = tl.program_id(0) * D + tl.arange(0, D)
        mask = o < d
        v, a, s = _adam(
            tl.load(value + o, mask=mask, other=0.0),
            tl.load(grad + o, mask=mask, other=0.0) * tl.load(scalars + 2),
            tl.load(avg + o, mask=mask, other=0.0),
            tl.load(sq + o, mask=mask, other=0.0),
            tl.load(scalars),
            tl.load(scalars + 1),
            beta1,
            beta2,
            eps,
        )
        tl.store(value + o, v, mask=mask)
        tl.store(avg + o, a, mask=mask)
        tl.store(sq + o, s, mask=mask)


class Update:
    """Adam over a dictionary whose decoder rows keep norm 1, as `project_gradients`, `Adam.step` and `normalize_decoder`.

    Nothing changes where the gradient is not finite. Moments of the matrices are float32 or bfloat16.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        moments: dict[str, Moments],
        step: Tensor,
        betas: tuple[float, float],
        eps: float,
        max_norm: float | None,
    ) -> None:
        """`parameters`, `moments`: w_enc_ND, b_enc_N, w_dec_ND, b_dec_D; `step`: steps taken, 0-dim float32."""
        self._p, self._m, self._step = parameters, moments, step
        self._betas, self._eps, self._max_norm = betas, eps, max_norm
        device = step.device
        self.rate = torch.zeros((), device=device)
        """The learning rate; fill it before a step."""
        self._scalars = torch.zeros(5, device=device)
        self.norm = self._scalars[4]
        self.w_enc_ND = parameters["w_enc_ND"].bfloat16()
        self.w_dec_ND = parameters["w_dec_ND"].bfloat16()
        self.b_enc_N = parameters["b_enc_N"].bfloat16()

    def copy_parameters(self) -> None:
        """Renew the bfloat16 copies after the parameters were changed from outside."""
        self.w_enc_ND.copy_(self._p["w_enc_ND"])
        self.w_dec_ND.copy_(self._p["w_dec_ND"])
        self.b_enc_N.copy_(self._p["b_enc_N"])

    def __call__(
        self,
        squares: Tensor,
        touched_N: Tensor,
        grad_enc_ND: Tensor,
        grad_dec_ND: Tensor,
        grad_b_N: Tensor,
        grad_b_D: Tensor,
    ) -> None:
        """Update all; `squares`: the squared norm of all gradients; rows not touched have gradient 0, unread."""
        beta1, beta2 = self._betas
        n, d = grad_enc_ND.shape
        _prepare[(1,)](
            self._step,
            self.rate,
            squares,
            self._scalars,
            self._max_norm or 0.0,
            -math.log(beta1),
            -math.log(beta2),
            self._max_norm is not None,
            num_warps=1,
        )
        tile = triton.next_power_of_2(d)
        _update_rows[(n,)](
            touched_N,
            self._p["w_enc_ND"],
            *self._m["w_enc_ND"],
            self.w_enc_ND,
            grad_enc_ND,
            self._p["w_dec_ND"],
            *self._m["w_dec_ND"],
            self.w_dec_ND,
            grad_dec_ND,
            self._p["b_enc_N"],
            *self._m["b_enc_N"],
            self.b_enc_N,
            grad_b_N,
            self._scalars,
            d,
            beta1,
            beta2,
            self._eps,
            tile,
            num_warps=max(1, min(16, tile // 512)),
        )
        _update_vector[(triton.cdiv(d, 1024),)](
            self._p["b_dec_D"], *self._m["b_dec_D"], grad_b_D, self._scalars, d, beta1, beta2, self._eps, 1024
        )
