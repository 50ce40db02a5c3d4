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

from plmsae_cli.sae.fused.gradients import WeightGradients


@triton.jit
def _one_minus_power(t, decay):
    """1 - exp(-decay t), by its series where the difference would lose digits."""
    y = t * decay
    series = y * (1 - y / 2 * (1 - y / 3 * (1 - y / 4 * (1 - y / 5))))
    return tl.where(y < 0.1, series, 1 - tl.exp(-y))


@triton.jit
def _collect(
    square,
    along,
    grad_b,
    counts,
    ages,
    energy,
    input_square,
    grad_b_parts,
    grad_b_dec,
    partial,
    n,
    rows,
    d,
    window,
    global_rows,
    S: tl.constexpr,
    SPLITS: tl.constexpr,
    T: tl.constexpr,
):
    """This program's share of: squared gradient, nested error, error, ||x||^2, active pairs, dead; ages move on."""
    first = tl.program_id(0) * T
    stride = tl.num_programs(0) * T
    o = tl.arange(0, T)
    squares = tl.zeros((T,), tl.float32)
    active = tl.zeros((T,), tl.float32)
    dead = tl.zeros((T,), tl.float32)
    for start in range(first, n, stride):
        latent = start + o
        mask = latent < n
        for part in tl.static_range(S):
            squares += tl.load(square + part * n + latent, mask=mask, other=0.0)
        # Without its part along the decoder row, a gradient is that much shorter.
        parallel = tl.load(along + latent, mask=mask, other=0.0)
        bias = tl.load(grad_b + latent, mask=mask, other=0.0)
        squares += bias * bias - parallel * parallel
        count = tl.load(counts + latent, mask=mask, other=0)
        active += count.to(tl.float32)
        age = tl.load(ages + latent, mask=mask, other=0)
        dead += (mask & (age >= window)).to(tl.float32)
        tl.store(ages + latent, tl.where(count > 0, 0, age + global_rows), mask=mask)
    for start in range(first, d, stride):
        column = start + o
        mask = column < d
        total = tl.zeros((T,), tl.float32)
        for split in range(SPLITS):
            total += tl.load(grad_b_parts + split * d + column, mask=mask, other=0.0)
        tl.store(grad_b_dec + column, total, mask=mask)
        squares += total * total
    nested = tl.zeros((T,), tl.float32)
    full = tl.zeros((T,), tl.float32)
    inputs = tl.zeros((T,), tl.float32)
    for start in range(first, rows, stride):
        row = start + o
        mask = row < rows
        nested += tl.load(energy + row, mask=mask, other=0.0)
        full += tl.load(energy + rows + row, mask=mask, other=0.0)
        inputs += tl.load(input_square + row, mask=mask, other=0.0)
    out = partial + tl.program_id(0) * 8
    tl.store(out, tl.sum(squares, 0))
    tl.store(out + 1, tl.sum(nested, 0))
    tl.store(out + 2, tl.sum(full, 0))
    tl.store(out + 3, tl.sum(inputs, 0))
    tl.store(out + 4, tl.sum(active, 0))
    tl.store(out + 5, tl.sum(dead, 0))


@triton.jit
def _finish(
    partial,
    aux,
    rate,
    step0,
    step1,
    step2,
    step3,
    scalars,
    figures,
    max_norm,
    decay1,
    decay2,
    per_error,
    per_token,
    per_latent,
    share,
    aux_coefficient,
    norm_unit,
    CLIP: tl.constexpr,
    P: tl.constexpr,
):
    """scalars: rate / (1 - beta1^t), 1 / sqrt(1 - beta2^t), clip factor, is finite, t; figures as `FIGURES`."""
    o = tl.arange(0, P)
    norm = tl.sqrt(tl.sum(tl.load(partial + o * 8), 0))
    finite = norm < float("inf")
    t = tl.load(step0) + tl.where(finite, 1.0, 0.0)
    tl.store(step0, t)
    tl.store(step1, t)
    tl.store(step2, t)
    tl.store(step3, t)
    tl.store(scalars, tl.load(rate) / _one_minus_power(t, decay1))
    tl.store(scalars + 1, 1.0 / tl.sqrt(_one_minus_power(t, decay2)))
    clip = 1.0 + norm * 0.0
    if CLIP:
        clip = 1.0 / tl.maximum(norm / max_norm, 1.0)
    tl.store(scalars + 2, clip)
    tl.store(scalars + 3, tl.where(finite, 1.0, 0.0))
    tl.store(scalars + 4, t)
    nested = tl.sum(tl.load(partial + o * 8 + 1), 0) * per_error
    aux_share = tl.load(aux) * share
    tl.store(figures, nested + aux_coefficient * aux_share)
    tl.store(figures + 1, nested)
    tl.store(figures + 2, aux_share)
    tl.store(figures + 3, tl.sum(tl.load(partial + o * 8 + 2), 0) / tl.sum(tl.load(partial + o * 8 + 3), 0) * share)
    tl.store(figures + 4, tl.sum(tl.load(partial + o * 8 + 4), 0) * per_token)
    tl.store(figures + 5, tl.sum(tl.load(partial + o * 8 + 5), 0) * per_latent)
    tl.store(figures + 6, norm * norm_unit)


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
def _adam(parameter, gradient, average, square, rate, correction, beta1, beta2, eps):
    average = beta1 * average + (1 - beta1) * gradient
    square = beta2 * square + (1 - beta2) * gradient * gradient
    return parameter - rate * average / (tl.sqrt(square) * correction + eps), average, square


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
            fired = tl.load(touched + latent) > 0
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
            _store_moment(dec_avg, at, average, mask, step, 4)
            _store_moment(dec_sq, at, square, mask, step, 5)

            value = tl.load(enc + at, mask=mask, other=0.0)
            gradient = tl.load(enc_grad + at, mask=mask & fired, other=0.0).to(tl.float32) * clip
            average = tl.load(enc_avg + at, mask=mask, other=0.0).to(tl.float32)
            square = tl.load(enc_sq + at, mask=mask, other=0.0).to(tl.float32)
            value, average, square = _adam(value, gradient, average, square, rate, correction, beta1, beta2, eps)
            tl.store(enc + at, value, mask=mask)
            tl.store(enc_copy + at, value.to(tl.bfloat16), mask=mask)
            _store_moment(enc_avg, at, average, mask, step, 0)
            _store_moment(enc_sq, at, square, mask, step, 1)

            one = latent + tl.arange(0, 1)
            gradient = tl.load(bias_grad + one) * clip
            average = tl.load(bias_avg + one).to(tl.float32)
            square = tl.load(bias_sq + one).to(tl.float32)
            value, average, square = _adam(
                tl.load(bias + one), gradient, average, square, rate, correction, beta1, beta2, eps
            )
            tl.store(bias + one, value)
            tl.store(bias_copy + one, value.to(tl.bfloat16))
            _store_moment(bias_avg, one, average, one < n, step, 2)
            _store_moment(bias_sq, one, square, one < n, step, 3)
        else:
            value = tl.load(centre + o, mask=mask, other=0.0)
            gradient = tl.load(centre_grad + o, mask=mask, other=0.0) * clip
            average = tl.load(centre_avg + o, mask=mask, other=0.0).to(tl.float32)
            square = tl.load(centre_sq + o, mask=mask, other=0.0).to(tl.float32)
            value, average, square = _adam(value, gradient, average, square, rate, correction, beta1, beta2, eps)
            tl.store(centre + o, value, mask=mask)
            _store_moment(centre_avg, o, average, mask, step, 6)
            _store_moment(centre_sq, o, square, mask, step, 7)


FIGURES = ("loss", "reconstruction", "aux", "fvu", "l0", "dead", "grad_norm")
PARAMETERS = ("w_enc_ND", "b_enc_N", "w_dec_ND", "b_dec_D")
"""In the order that numbers the salts of their moments' rounding."""
_PROGRAMS = 128


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
        self._partial = torch.zeros(_PROGRAMS, 8, device=device)
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
        _collect[(_PROGRAMS,)](
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
        _finish[(1,)](
            self._partial,
            aux,
            self.rate,
            *(s[f"{name}.step"] for name in PARAMETERS),
            self._scalars,
            self.figures,
            max_norm or 0.0,
            -math.log(beta1),
            -math.log(beta2),
            share / (groups * global_rows * d),
            share / global_rows,
            share / n,
            share,
            aux_coefficient,
            share * d,
            max_norm is not None,
            _PROGRAMS,
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
            self._options.eps,
            tile,
            num_warps=max(1, min(16, tile // 1024)),
        )

    def _of(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        return self._parameters[name], self._state[f"{name}.exp_avg"], self._state[f"{name}.exp_avg_sq"]
