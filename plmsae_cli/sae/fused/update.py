"""One pass over parameters and moments: clip, projection, Adam, renormalisation, and the bfloat16 copies."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from plmsae_cli.sae.fused.collect import FIGURES, PROGRAMS, collect, finish
from plmsae_cli.sae.fused.gradients import WeightGradients


@triton.jit
def _mix(h):
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _store_moment(pointer, at, value, mask, step, SALT: tl.constexpr):
    """As float32, or in bfloat16 by the stochastic rounding of `training.rounding`."""
    if pointer.dtype.element_ty == tl.bfloat16:
        salted = _mix(_mix(tl.full((1,), SALT, tl.uint32)) ^ step.to(tl.uint32))
        random = _mix(salted ^ at.to(tl.uint32)) >> 16
        bits = (value.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
        value = bits.to(tl.float32, bitcast=True)
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _adam(
    value,
    average,
    square,
    at,
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
    """The new values (the caller stores them); stores the moments. rest = 1 - beta, exactly; FIRST: salt of the first moment."""
    m = beta1 * tl.load(average + at, mask=mask, other=0.0).to(tl.float32) + rest1 * gradient
    v = beta2 * tl.load(square + at, mask=mask, other=0.0).to(tl.float32) + rest2 * gradient * gradient
    _store_moment(average, at, m, mask, step, FIRST)
    _store_moment(square, at, v, mask, step, FIRST + 1)
    return value - rate * m / (tl.sqrt(v) * correction + eps)


@triton.jit
def _update(
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
    n,
    d: tl.constexpr,
    beta1,
    beta2,
    rest1,
    rest2,
    eps,
    D: tl.constexpr,
):
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
            row = tl.load(dec + at, mask=mask, other=0.0)
            slope = tl.load(dec_grad + at, mask=fired, other=0.0).to(tl.float32)
            slope = (slope - tl.sum(slope * row, 0) / tl.sum(row * row, 0) * row) * clip
            row = _adam(
                row, dec_avg, dec_sq, at, mask, slope, rate, correction, beta1, beta2, rest1, rest2, eps, step, 4
            )
            row = row / tl.sqrt(tl.sum(tl.where(mask, row * row, 0.0), 0))
            tl.store(dec + at, row, mask=mask)
            tl.store(dec_copy + at, row.to(tl.bfloat16), mask=mask)

            row = tl.load(enc + at, mask=mask, other=0.0)
            slope = tl.load(enc_grad + at, mask=fired, other=0.0).to(tl.float32) * clip
            row = _adam(
                row, enc_avg, enc_sq, at, mask, slope, rate, correction, beta1, beta2, rest1, rest2, eps, step, 0
            )
            tl.store(enc + at, row, mask=mask)
            tl.store(enc_copy + at, row.to(tl.bfloat16), mask=mask)

            one = latent + tl.arange(0, 1)
            b = tl.load(bias + one)
            g = tl.load(bias_grad + one) * clip
            b = _adam(b, bias_avg, bias_sq, one, one < n, g, rate, correction, beta1, beta2, rest1, rest2, eps, step, 2)
            tl.store(bias + one, b)
            tl.store(bias_copy + one, b.to(tl.bfloat16))
        else:
            c = tl.load(centre + o, mask=mask, other=0.0)
            gc = tl.load(centre_grad + o, mask=mask, other=0.0) * clip
            c = _adam(c, centre_avg, centre_sq, o, mask, gc, rate, correction, beta1, beta2, rest1, rest2, eps, step, 6)
            tl.store(centre + o, c, mask=mask)


PARAMETERS = ("w_enc_ND", "b_enc_N", "w_dec_ND", "b_dec_D")
"""In the order that numbers the salts of their moments' rounding."""


@dataclass(frozen=True)
class AdamOptions:
    """Adam's settings; `max_norm` clips the gradient of the mean over tokens and dimensions, None does not."""

    betas: tuple[float, float]
    eps: float
    max_norm: float | None


class Update:
    """What `project_gradients`, `Optimizer.step` and `normalize_decoder` do, ages and figures included.

    Nothing but the ages changes where the gradient is not finite.
    """

    def __init__(self, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor], options: AdamOptions) -> None:
        """`state`: `<parameter>.<step | exp_avg | exp_avg_sq>`; moments float32, or bfloat16 as in `RoundedAdam`."""
        self._parameters, self._options = parameters, options
        self._state = state
        device = parameters["w_enc_ND"].device
        self.rate = torch.zeros((), device=device)
        """The learning rate; fill it before a step."""
        self.figures = torch.zeros(len(FIGURES), device=device)
        """Those of `FIGURES`, as this rank's share of a sum over ranks."""
        self._scalars = torch.zeros(5, device=device)
        self._partial = torch.zeros(PROGRAMS, 8, device=device)
        self._grad_b_D = torch.zeros_like(parameters["b_dec_D"])
        self.w_enc_ND = parameters["w_enc_ND"].bfloat16()
        self.w_dec_ND = parameters["w_dec_ND"].bfloat16()
        self.b_enc_N = parameters["b_enc_N"].bfloat16()

    def copy_parameters(self) -> None:
        """Renew the bfloat16 copies after the parameters were changed from outside."""
        for name in ("w_enc_ND", "w_dec_ND", "b_enc_N"):
            getattr(self, name).copy_(self._parameters[name])

    def __call__(
        self,
        gradients: WeightGradients,
        ages_N: Tensor,
        window: int,
        energy_2B: Tensor,
        square_B: Tensor,
        aux: Tensor,
        aux_coefficient: float,
        groups: int,
        global_rows: int,
        world: int,
    ) -> None:
        """`energy_2B`, `square_B`: nested and full error and ||x||^2 by row, or one column of their sums over ranks."""
        g, p, s = gradients, self._parameters, self._state
        beta1, beta2 = self._options.betas
        max_norm = self._options.max_norm
        n, d = p["w_enc_ND"].shape
        share = 1.0 / world
        collect[(PROGRAMS,)](
            g.square_SN,
            g.along_N,
            g.grad_b_N,
            g.counts_N,
            ages_N,
            energy_2B,
            square_B,
            g.grad_b_SD,
            self._grad_b_D,
            self._partial,
            n,
            energy_2B.shape[1],
            d,
            window,
            global_rows,
            len(g.square_SN),
            len(g.grad_b_SD),
            256,
        )
        finish[(1,)](
            self._partial,
            aux,
            self.rate,
            *(s[f"{name}.step"] for name in PARAMETERS),
            self._scalars,
            self.figures,
            max_norm or 0.0,
            -math.log(beta1) if beta1 else math.inf,
            -math.log(beta2) if beta2 else math.inf,
            share / (groups * global_rows * d),
            share / global_rows,
            share / n,
            share,
            aux_coefficient,
            share * d,
            max_norm is not None,
            PROGRAMS,
        )
        tile = triton.next_power_of_2(d)
        _update[(n + 1,)](
            g.touched_N,
            *self._of("w_enc_ND"),
            self.w_enc_ND,
            g.grad_enc_ND,
            *self._of("w_dec_ND"),
            self.w_dec_ND,
            g.grad_dec_ND,
            *self._of("b_enc_N"),
            self.b_enc_N,
            g.grad_b_N,
            *self._of("b_dec_D"),
            self._grad_b_D,
            self._scalars,
            n,
            d,
            beta1,
            beta2,
            1 - beta1,
            1 - beta2,
            self._options.eps,
            tile,
            num_warps=max(1, min(16, tile // 2048)),
        )

    def _of(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        return self._parameters[name], self._state[f"{name}.exp_avg"], self._state[f"{name}.exp_avg_sq"]
