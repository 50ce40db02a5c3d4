"""Weight gradients: for each latent, the sum over the tokens it fired on, in the order of the tokens.

Real dictionaries have latents that fire on most tokens. One program would walk thousands of rows while the others
wait, so a long list is cut into chunks of fixed length, summed apart and then added up in order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plmsae_cli.sae.fused.pairs import ActivePairs
from plmsae_cli.sae.fused.residual import tile_of

CHUNK = 256
"""Tokens that one program adds up; longer lists are cut."""
UNROLL = 4
SPLITS = 64
PAIRS_A_PROGRAM = 1024


@triton.jit
def _permute(
    order, acts, slope, tokens, token, act_sorted, slope_sorted, pairs, k, RAGGED: tl.constexpr, TILE: tl.constexpr
):
    p = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = p < pairs
    source = tl.load(order + p, mask=mask, other=0)
    row = tl.load(tokens + source, mask=mask, other=0) if RAGGED else (source // k).to(tl.int32)
    tl.store(token + p, row, mask=mask)
    tl.store(act_sorted + p, tl.load(acts + source, mask=mask), mask=mask)
    tl.store(slope_sorted + p, tl.load(slope + source, mask=mask), mask=mask)


@triton.jit
def _sums(
    begin,
    end,
    group,
    token,
    act,
    slope,
    x,
    residual,
    o,
    mask,
    d: tl.constexpr,
    G: tl.constexpr,
    DEC: tl.constexpr,
    ENC: tl.constexpr,
    U: tl.constexpr,
    D: tl.constexpr,
):
    dec = tl.zeros((D,), tl.float32)
    enc = tl.zeros((D,), tl.float32)
    for start in range(begin, end, U):
        p = start + tl.arange(0, U)
        here = p < end
        row = tl.load(token + p, mask=here, other=0).to(tl.int64)
        both = here[:, None] & mask[None, :]
        if DEC:
            a = tl.load(act + p, mask=here, other=0.0)
            r = tl.load(residual + (row * G + group)[:, None] * d + o[None, :], mask=both, other=0.0).to(tl.float32)
            dec += tl.sum(a[:, None] * r, 0)
        if ENC:
            s = tl.load(slope + p, mask=here, other=0.0)
            v = tl.load(x + row[:, None] * d + o[None, :], mask=both, other=0.0).to(tl.float32)
            enc += tl.sum(s[:, None] * v, 0)
    return dec, enc


@triton.jit
def _group_of(latent, prefixes, G: tl.constexpr):
    group = 0
    for g in tl.static_range(G - 1):
        group += (latent >= tl.load(prefixes + g)).to(tl.int32)
    return group


@triton.jit
def _long(
    offsets,
    sort_keys,
    token,
    act,
    slope,
    x,
    residual,
    prefixes,
    partial,
    shift,
    n,
    d: tl.constexpr,
    CHUNK: tl.constexpr,
    G: tl.constexpr,
    DEC: tl.constexpr,
    ENC: tl.constexpr,
    U: tl.constexpr,
    D: tl.constexpr,
):
    chunk = tl.program_id(0)
    begin = chunk * CHUNK
    latent = tl.load(sort_keys + begin).to(tl.int32) + shift
    if latent < n:
        end = tl.load(offsets + latent + 1)
        if end - tl.load(offsets + latent) > CHUNK:
            o = tl.program_id(1) * D + tl.arange(0, D)
            mask = o < d
            group = _group_of(latent, prefixes, G)
            end = tl.minimum(begin + CHUNK, end)
            dec, enc = _sums(begin, end, group, token, act, slope, x, residual, o, mask, d, G, DEC, ENC, U, D)
            if DEC:
                tl.store(partial + chunk.to(tl.int64) * (2 * d) + o, dec, mask=mask)
            if ENC:
                tl.store(partial + chunk.to(tl.int64) * (2 * d) + d + o, enc, mask=mask)


@triton.jit
def _gradients(
    offsets,
    token,
    act,
    slope,
    x,
    residual,
    prefixes,
    partial,
    grad_dec,
    grad_enc,
    grad_b,
    along,
    square,
    counts,
    touched,
    n,
    d: tl.constexpr,
    factor,
    WRITE_ZEROS: tl.constexpr,
    CHUNK: tl.constexpr,
    G: tl.constexpr,
    DEC: tl.constexpr,
    ENC: tl.constexpr,
    U: tl.constexpr,
    D: tl.constexpr,
):
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
        group = _group_of(latent, prefixes, G)
        # A long list begins with what is left of the chunk it begins in; whole chunks were summed by `_long`.
        whole = tl.where(count > CHUNK, (begin + CHUNK - 1) // CHUNK, (end + CHUNK - 1) // CHUNK)
        head = tl.minimum(whole * CHUNK, end)
        dec, enc = _sums(begin, head, group, token, act, slope, x, residual, o, mask, d, G, DEC, ENC, U, D)
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
            tl.store(grad_dec + latent.to(tl.int64) * d + o, dec, mask=mask)
        if ENC:
            tl.store(grad_enc + latent.to(tl.int64) * d + o, enc, mask=mask)
    if DEC and ENC:  # apart, they are only terms of a sum over ranks
        dec = dec.to(tl.float32)
        enc = enc.to(tl.float32)
        tl.store(square + part * n + latent, tl.sum(dec * dec + enc * enc, 0))
    if DEC and part == 0:
        bias = 0.0
        parallel = 0.0
        for start in range(begin, end, 128):
            p = start + tl.arange(0, 128)
            s = tl.load(slope + p, mask=p < end, other=0.0)
            bias += tl.sum(s, 0)
            parallel += tl.sum(s * tl.load(act + p, mask=p < end, other=0.0), 0)
        tl.store(grad_b + latent, bias * factor)
        tl.store(along + latent, parallel * factor)
        tl.store(counts + latent, count)
        tl.store(touched + latent, (count > 0).to(tl.int32))


@triton.jit
def _columns(
    residual,
    grad_b,
    w,
    partial,
    rows,
    n,
    d: tl.constexpr,
    factor,
    rows_a_split,
    latents_a_split,
    G: tl.constexpr,
    U: tl.constexpr,
    D: tl.constexpr,
):
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


class WeightGradients:
    """Gradients of all parameters from the active pairs, in buffers made once.

    grad_dec_ND and grad_enc_ND (bfloat16; not yet without the part along the decoder row), grad_b_N; `counts_N`, on
    how many tokens each latent fired; `square_SN`, parts of each latent's squared gradient norm; `along_N`, <gradient
    of its decoder row, that row>; `touched_N`: whose gradient is not 0. Other rows are left as they were unless there
    are terms of other ranks to add. `grad_b_SD` sums over its splits to the gradient of b_dec.
    """

    def __init__(
        self,
        rows: int,
        num_latents: int,
        d: int,
        pairs: int,
        prefixes_G: Tensor,
        device: torch.device,
        padded: int | None = None,
    ) -> None:
        """`pairs`: places for active ones, as in `ActivePairs`; `padded`: rows of the matrices that are summed over ranks,
        at least N, None where none are.
        """
        self._shape = (rows, num_latents, d)
        self.prefixes_G, self._write_zeros = prefixes_G, padded is not None
        self._tile = tile_of(d, 512)
        self.whole_dec, self.whole_enc = torch.zeros(2, padded or num_latents, d, dtype=torch.bfloat16, device=device)
        self.grad_dec_ND, self.grad_enc_ND = self.whole_dec[:num_latents], self.whole_enc[:num_latents]
        self.grad_b_N = torch.zeros(num_latents, device=device)
        self.along_N = torch.zeros(num_latents, device=device)
        self.square_SN = torch.zeros(triton.cdiv(d, self._tile), num_latents, device=device)
        self.counts_N = torch.zeros(num_latents, dtype=torch.int32, device=device)
        self.touched_N = torch.zeros(num_latents, dtype=torch.int32, device=device)
        self.grad_b_SD = torch.zeros(SPLITS, d, device=device)
        self._token_P = torch.empty(pairs, dtype=torch.int32, device=device)
        self._act_P = torch.empty(pairs, device=device)
        self._slope_P = torch.empty(pairs, device=device)
        self._latents_N1 = torch.arange(num_latents + 1, dtype=torch.int32, device=device)
        self._offsets_N1 = torch.empty_like(self._latents_N1)
        self._partial = torch.empty(triton.cdiv(pairs, CHUNK), 2, d, device=device)
        self._sorted_P: Tensor | None = None
        self._shift = 0
        self._order_P = torch.empty(pairs, dtype=torch.int64, device=device)

    def order(self, active: ActivePairs) -> None:
        """Find the order of the pairs by latent, then token."""
        if self._sorted_P is None:
            self._sorted_P = torch.empty_like(active.sort_keys_P)
        torch.sort(active.sort_keys_P, stable=True, out=(self._sorted_P, self._order_P))
        wanted_N1 = (self._latents_N1 - active.shift).to(self._sorted_P.dtype)
        torch.searchsorted(self._sorted_P, wanted_N1, out_int32=True, out=self._offsets_N1)
        self._shift = active.shift

    def permute(self, active: ActivePairs, slope_P: Tensor) -> None:
        """Bring the pairs into that order."""
        pairs, ragged = len(self._order_P), active.token_P is not None
        sorted_ = (self._token_P, self._act_P, self._slope_P)
        _permute[(triton.cdiv(pairs, PAIRS_A_PROGRAM),)](
            self._order_P, active.acts_P, slope_P, active.token_P, *sorted_,
            pairs, pairs // self._shape[0], ragged, PAIRS_A_PROGRAM,
        )  # fmt: skip

    def sum(
        self, x_BD: Tensor, residual_BGD: Tensor, factor: float, decoder: bool = True, encoder: bool = True
    ) -> None:
        """Gradients of the pairs brought last, with dL/dr = `factor` * residual; all but `grad_b_SD`.

        Of one matrix or of both; what belongs to neither comes with the decoder's. Apart, there are no squares.
        """
        _, n, d = self._shape
        pair_data = (self._token_P, self._act_P, self._slope_P, x_BD, residual_BGD, self.prefixes_G, self._partial)
        tiles = len(self.square_SN)
        sizes = (CHUNK, residual_BGD.shape[1], decoder, encoder, UNROLL, self._tile)
        warps = max(1, self._tile // 256)  # a warp then holds whole rows: no sum crosses warps
        _long[(len(self._partial), tiles)](
            self._offsets_N1, self._sorted_P, *pair_data, self._shift, n, d, *sizes, num_warps=warps
        )
        _gradients[(n, tiles)](
            self._offsets_N1,
            *pair_data,
            self.grad_dec_ND,
            self.grad_enc_ND,
            self.grad_b_N,
            self.along_N,
            self.square_SN,
            self.counts_N,
            self.touched_N,
            n,
            d,
            factor,
            self._write_zeros,
            *sizes,
            num_warps=warps,
        )

    def of_decoder_bias(self, residual_BGD: Tensor, w_enc_ND: Tensor, factor: float) -> None:
        """grad_b_SD, from the residuals and, through x - b_dec, from the encoder's bias."""
        rows = len(residual_BGD)
        _, n, d = self._shape
        tile = tile_of(d, 128)
        _columns[(SPLITS, triton.cdiv(d, tile))](
            residual_BGD,
            self.grad_b_N,
            w_enc_ND,
            self.grad_b_SD,
            rows,
            n,
            d,
            factor,
            triton.cdiv(rows, SPLITS),
            triton.cdiv(n, SPLITS),
            residual_BGD.shape[1],
            64,
            tile,
            num_warps=2,
        )
