"""Kernels of `gradients`: pairs in the order of their latents, and sums over each latent's pairs."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from plmsae_cli.sae.fused.nested import group_of


class SortedPairs(NamedTuple):
    """The pairs by latent, then token; what follows the last active one is void. Pointers inside kernels."""

    token_P: Tensor
    act_P: Tensor
    slope_P: Tensor
    along_P: Tensor
    """Activation times its slope."""


class OfLatents(NamedTuple):
    """What sums over tokens give each latent, as `gradients.WeightGradients` has it: pointers inside kernels."""

    grad_dec_ND: Tensor
    grad_enc_ND: Tensor
    grad_b_N: Tensor
    along_N: Tensor
    square_SN: Tensor
    counts_N: Tensor
    touched_N: Tensor


@triton.jit
def permute(
    order, acts, slope, tokens, weights, pairs, total, size, k, RAGGED: tl.constexpr, WEIGHTED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * TILE + tl.arange(0, TILE)
    # Void places come last in either order.
    mask = p < (tl.load(total) if RAGGED else size)
    source = tl.load(order + p, mask=mask, other=0)
    row = tl.load(tokens + source, mask=mask, other=0) if RAGGED else (source // k).to(tl.int32)
    tl.store(pairs.token_P + p, row, mask=mask)
    act = tl.load(acts + source, mask=mask, other=0.0)
    by_act = tl.where(act > 0, tl.load(slope + source, mask=mask, other=0.0), 0.0)
    tl.store(pairs.act_P + p, act, mask=mask)
    tl.store(pairs.along_P + p, by_act * act, mask=mask)
    if WEIGHTED:  # the activation is so many times the encoder's
        by_act *= tl.load(weights + row, mask=mask, other=0.0)
    tl.store(pairs.slope_P + p, by_act, mask=mask)


@triton.jit
def _sums(
    begin, end, group, pairs, x, residual, o, mask, d: tl.constexpr, G: tl.constexpr, DEC: tl.constexpr,
    ENC: tl.constexpr, U: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    dec = tl.zeros((D,), tl.float32)
    enc = tl.zeros((D,), tl.float32)
    for start in range(begin, end, U):
        p = start + tl.arange(0, U)
        here = p < end
        row = tl.load(pairs.token_P + p, mask=here, other=0).to(tl.int64)
        both = here[:, None] & mask[None, :]
        if DEC:
            a = tl.load(pairs.act_P + p, mask=here, other=0.0)
            r = tl.load(residual + (row * G + group)[:, None] * d + o[None, :], mask=both, other=0.0).to(tl.float32)
            dec += tl.sum(a[:, None] * r, 0)
        if ENC:
            s = tl.load(pairs.slope_P + p, mask=here, other=0.0)
            v = tl.load(x + row[:, None] * d + o[None, :], mask=both, other=0.0).to(tl.float32)
            enc += tl.sum(s[:, None] * v, 0)
    return dec, enc


@triton.jit
def long(
    offsets, sort_keys, pairs, x, residual, prefixes, partial, shift, n, d: tl.constexpr, CHUNK: tl.constexpr,
    G: tl.constexpr, DEC: tl.constexpr, ENC: tl.constexpr, U: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    for chunk in range(tl.program_id(0), tl.cdiv(tl.load(offsets + n), CHUNK), tl.num_programs(0)):
        begin = chunk * CHUNK
        latent = tl.load(sort_keys + begin).to(tl.int32) + shift
        end = tl.load(offsets + latent + 1)
        if end - tl.load(offsets + latent) > CHUNK:
            o = tl.program_id(1) * D + tl.arange(0, D)
            mask = o < d
            group = group_of(latent, prefixes, G)
            end = tl.minimum(begin + CHUNK, end)
            dec, enc = _sums(begin, end, group, pairs, x, residual, o, mask, d, G, DEC, ENC, U, D)
            place = partial + tl.cast(chunk, tl.int64) * (2 * d) + o
            if DEC:
                tl.store(place, dec, mask=mask)
            if ENC:
                tl.store(place + d, enc, mask=mask)


@triton.jit
def gradients(
    offsets, pairs, x, residual, prefixes, partial, out, n, d: tl.constexpr, factor, WRITE_ZEROS: tl.constexpr,
    CHUNK: tl.constexpr, G: tl.constexpr, DEC: tl.constexpr, ENC: tl.constexpr, U: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    latent = tl.program_id(0)
    part = tl.program_id(1)
    begin = tl.load(offsets + latent)
    end = tl.load(offsets + latent + 1)
    count = end - begin
    o = part * D + tl.arange(0, D)
    mask = o < d
    dec = tl.zeros((D,), tl.float32)
    enc = tl.zeros((D,), tl.float32)
    if count > 0:
        group = group_of(latent, prefixes, G)
        # A long list begins with what is left of the chunk it begins in; whole chunks were summed by `_long`.
        whole = tl.where(count > CHUNK, (begin + CHUNK - 1) // CHUNK, (end + CHUNK - 1) // CHUNK)
        head = tl.minimum(whole * CHUNK, end)
        dec, enc = _sums(begin, head, group, pairs, x, residual, o, mask, d, G, DEC, ENC, U, D)
        for chunk in range(whole, (end + CHUNK - 1) // CHUNK):
            base = partial + tl.cast(chunk, tl.int64) * (2 * d) + o
            if DEC:
                dec += tl.load(base, mask=mask, other=0.0)
            if ENC:
                enc += tl.load(base + d, mask=mask, other=0.0)
    dec = (dec * factor).to(tl.bfloat16)
    enc = (enc * factor).to(tl.bfloat16)
    if WRITE_ZEROS or count > 0:
        if DEC:
            tl.store(out.grad_dec_ND + latent.to(tl.int64) * d + o, dec, mask=mask)
        if ENC:
            tl.store(out.grad_enc_ND + latent.to(tl.int64) * d + o, enc, mask=mask)
    if DEC and ENC:  # apart, they are only terms of a sum over ranks
        dec = dec.to(tl.float32)
        enc = enc.to(tl.float32)
        tl.store(out.square_SN + part * n + latent, tl.sum(dec * dec + enc * enc, 0))
    if DEC and part == 0:
        bias = 0.0
        parallel = 0.0
        fired = 0
        for start in range(begin, end, 128):
            p = start + tl.arange(0, 128)
            s = tl.load(pairs.slope_P + p, mask=p < end, other=0.0)
            bias += tl.sum(s, 0)
            parallel += tl.sum(tl.load(pairs.along_P + p, mask=p < end, other=0.0), 0)
            fired += tl.sum((tl.load(pairs.act_P + p, mask=p < end, other=0.0) > 0).to(tl.int32), 0)
        tl.store(out.grad_b_N + latent, bias * factor)
        tl.store(out.along_N + latent, parallel * factor)
        tl.store(out.counts_N + latent, fired)
        tl.store(out.touched_N + latent, (count > 0).to(tl.int32))


@triton.jit
def columns(
    residual, grad_b, w, partial, rows, n, d: tl.constexpr, factor, rows_a_split, latents_a_split, G: tl.constexpr,
    U: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    o = tl.program_id(1) * D + tl.arange(0, D)
    mask = o < d
    total = tl.zeros((D,), tl.float32)
    stop = tl.minimum((split + 1) * rows_a_split, rows)
    for start in range(split * rows_a_split, stop, U):
        row = start + tl.arange(0, U)
        both = (row < stop)[:, None] & mask[None, :]
        total += tl.sum(
            tl.load(residual + row.to(tl.int64)[:, None] * (G * d) + o[None, :], mask=both, other=0.0).to(tl.float32), 0
        )
    total = total * factor
    stop = tl.minimum((split + 1) * latents_a_split, n)
    for start in range(split * latents_a_split, stop, U):
        latent = start + tl.arange(0, U)
        g = tl.load(grad_b + latent, mask=latent < stop, other=0.0)
        both = (latent < stop)[:, None] & mask[None, :]
        weights = tl.load(w + latent.to(tl.int64)[:, None] * d + o[None, :], mask=both, other=0.0).to(tl.float32)
        total -= tl.sum(g[:, None] * weights, 0)
    tl.store(partial + split * d + o, total, mask=mask)
