"""Switch's router and its experts' encoders: each token is scored by the latents of one expert alone.

Tokens are put in order of expert by counting, each expert's list filled up to whole tiles; a tile is a product with the
expert's rows, read where they lie.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plmsae_cli.sae.fused.top_k import TopKEncoder

ROUTED = 64
"""Tokens that one program sends to their experts."""
TILE = 64
"""Tokens of one expert that are scored at once."""


@triton.jit
def _route(
    x,
    w,
    shift,
    probabilities,
    probability,
    bases,
    cell,
    rank,
    counts,
    sums,
    rows,
    part,
    d: tl.constexpr,
    experts: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
):
    block = tl.program_id(0)
    row = block * T + tl.arange(0, T)
    e = tl.arange(0, E)
    here = row < rows
    known = e < experts
    logits = tl.zeros((T, E), tl.float32)
    for start in range(0, d, D):
        o = start + tl.arange(0, D)
        places = x + row.to(tl.int64)[:, None] * d + o[None, :]
        inputs = tl.load(places, mask=here[:, None] & (o < d)[None, :], other=0.0).to(tl.float32)
        weights = tl.load(w + e[None, :] * d + o[:, None], mask=known[None, :] & (o < d)[:, None], other=0.0)
        # In low precision many tokens would tie between experts.
        logits = tl.dot(inputs, weights, logits, input_precision="tf32x3")
    logits = tl.where(known[None, :], logits + tl.load(shift + e, mask=known, other=0.0)[None, :], float("-inf"))
    top = tl.max(logits, 1)
    raised = tl.exp(logits - top[:, None])
    p = raised / tl.sum(raised, 1)[:, None]
    best = tl.min(tl.where(logits == top[:, None], e[None, :], experts - 1), 1)
    own = (e[None, :] == best[:, None]) & here[:, None]
    ones = own.to(tl.int32)
    table = row.to(tl.int64)[:, None] * experts + e[None, :]
    tl.store(probabilities + table, p, mask=here[:, None] & known[None, :])
    tl.store(probability + row, tl.sum(tl.where(own, p, 0.0), 1), mask=here)
    tl.store(bases + row, best * part, mask=here)
    tl.store(cell + row, block * experts + best, mask=here)
    tl.store(rank + row, tl.sum(tl.where(own, tl.cumsum(ones, 0) - 1, 0), 1), mask=here)
    tl.store(counts + block * experts + e, tl.sum(ones, 0), mask=known)
    tl.store(sums + block * experts + e, tl.sum(tl.where(here[:, None], p, 0.0), 0), mask=known)


@triton.jit
def _expert_scores(
    x,
    w,
    bias,
    order,
    expert_of,
    scores,
    part,
    d: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    tile = tl.program_id(0)
    if tl.load(order + tile * M) >= 0:
        token = tl.load(order + tile * M + tl.arange(0, M))
        here = token >= 0
        latent = tl.program_id(1) * N + tl.arange(0, N)
        known = latent < part
        first = tl.load(expert_of + tile).to(tl.int64) * part
        of_token = x + token.to(tl.int64)[:, None] * d
        of_latent = w + (first + latent)[None, :] * d
        total = tl.zeros((M, N), tl.float32)
        for start in range(0, d, D):
            o = start + tl.arange(0, D)
            inputs = tl.load(of_token + o[None, :], mask=here[:, None] & (o < d)[None, :], other=0.0)
            weights = tl.load(of_latent + o[:, None], mask=known[None, :] & (o < d)[:, None], other=0.0)
            total = tl.dot(inputs, weights, total)
        total += tl.load(bias + first + latent, mask=known, other=0.0).to(tl.float32)[None, :]
        to = scores + token.to(tl.int64)[:, None] * part + latent[None, :]
        tl.store(to, total.to(tl.bfloat16), mask=here[:, None] & known[None, :])


@triton.jit
def _route_backward(
    acts,
    slope,
    probabilities,
    probability,
    bases,
    balance,
    out,
    sums,
    rows,
    k,
    part,
    factor,
    experts: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
):
    block = tl.program_id(0)
    row = block * T + tl.arange(0, T)
    e = tl.arange(0, E)
    slot = tl.arange(0, K)
    here = row < rows
    both = here[:, None] & (e < experts)[None, :]
    held = here[:, None] & (slot < k)[None, :]
    pair = row.to(tl.int64)[:, None] * k + slot[None, :]
    products = tl.load(acts + pair, mask=held, other=0.0) * tl.load(slope + pair, mask=held, other=0.0)
    by_chosen = tl.sum(products, 1) * factor / tl.load(probability + row, mask=here, other=1.0)
    table = row.to(tl.int64)[:, None] * experts + e[None, :]
    p = tl.load(probabilities + table, mask=both, other=0.0)
    own = e[None, :] == (tl.load(bases + row, mask=here, other=0) // part)[:, None]
    by_p = tl.load(balance + e, mask=e < experts, other=0.0)[None, :] + tl.where(own, by_chosen[:, None], 0.0)
    by_logit = p * (by_p - tl.sum(p * by_p, 1)[:, None])
    tl.store(out + table, by_logit.to(tl.bfloat16), mask=both)
    tl.store(sums + block * experts + e, tl.sum(by_logit, 0), mask=e < experts)


class ExpertEncoder:
    """p ReLU(TopK_k(x W^T + b)) over the latents of each token's expert, in buffers made once; as `TopKEncoder`.

    `route`, then the call. `probability_B` is p, `tokens_E` how many tokens each expert has, `mean_E` its mean probability.
    """

    def __init__(self, rows: int, num_latents: int, k: int, experts: int, device: torch.device) -> None:
        self._rows, self._k, self._experts, self._part = rows, k, experts, num_latents // experts
        self._top = TopKEncoder(rows, self._part, k, device, whole=num_latents)
        self.pairs = self._top.pairs
        self._places = max(16, triton.next_power_of_2(experts))
        blocks = triton.cdiv(rows, ROUTED)
        tiles = rows // TILE + experts
        self._probabilities_BE = torch.empty(rows, experts, device=device)
        self.probability_B = torch.empty(rows, device=device)
        self._bases_B = torch.zeros(rows, dtype=torch.int32, device=device)
        self._cell_B, self._rank_B = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self._counts_SE = torch.zeros(blocks, experts, dtype=torch.int64, device=device)
        self._sums_SE = torch.empty(blocks, experts, device=device)
        self._tokens_B = torch.arange(rows, dtype=torch.int32, device=device)
        self._order = torch.empty(tiles * TILE, dtype=torch.int32, device=device)
        self._tiles_T = torch.arange(tiles, device=device)
        self._scores = torch.empty(rows, self._part, dtype=torch.bfloat16, device=device)
        self._slopes_BE = torch.empty(rows, experts, dtype=torch.bfloat16, device=device)
        self.tokens_E = torch.zeros(experts, dtype=torch.int64, device=device)
        self.mean_E = torch.zeros(experts, device=device)

    def route(self, x_BD: Tensor, w_router_ED: Tensor, shift_D: Tensor) -> None:
        """Choose experts by (x + shift) W_r^T, x in bfloat16 and the rest in float32."""
        rows, d = x_BD.shape
        _route[(len(self._counts_SE),)](
            x_BD,
            w_router_ED,
            torch.mv(w_router_ED, shift_D),
            self._probabilities_BE,
            self.probability_B,
            self._bases_B,
            self._cell_B,
            self._rank_B,
            self._counts_SE,
            self._sums_SE,
            rows,
            self._part,
            d,
            self._experts,
            ROUTED,
            self._places,
            32,
            num_warps=4,
        )
        torch.sum(self._counts_SE, 0, out=self.tokens_E)
        torch.mean(self._sums_SE, 0, out=self.mean_E).mul_(len(self._sums_SE) / rows)

    def __call__(self, x_BD: Tensor, w_ND: Tensor, b_N: Tensor) -> None:
        """Encode `x_BD` (bfloat16, already less b_dec)."""
        tiles_E = (self.tokens_E + TILE - 1) // TILE
        ends_E = tiles_E.cumsum(0)
        starts_SE = (ends_E - tiles_E) * TILE + self._counts_SE.cumsum(0) - self._counts_SE
        place_B = starts_SE.view(-1).index_select(0, self._cell_B) + self._rank_B
        self._order.fill_(-1).scatter_(0, place_B, self._tokens_B)
        expert_T = torch.searchsorted(ends_E, self._tiles_T, right=True).clamp_(max=self._experts - 1)
        n = min(128, max(16, triton.next_power_of_2(self._part)))
        _expert_scores[(len(expert_T), triton.cdiv(self._part, n))](
            x_BD, w_ND, b_N, self._order, expert_T, self._scores, self._part, x_BD.shape[1], TILE, n, 64, num_warps=4
        )
        for first in range(0, self._rows, self._top.tile):
            self._top.select(self._scores[first : first + self._top.tile], first, self._bases_B, self.probability_B)

    def slopes(self, slope_P: Tensor, factor: float, balance_E: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives by the router's logits, bfloat16 [B, E], and their sum over tokens, float32 [E].

        `slope_P` over `factor` are those by the activations; `balance_E` those of the load balance by each p.
        """
        blocks = triton.cdiv(self._rows, ROUTED)
        sums_SE = torch.empty(blocks, self._experts, device=slope_P.device)
        _route_backward[(blocks,)](
            self.pairs.acts_P,
            slope_P,
            self._probabilities_BE,
            self.probability_B,
            self._bases_B,
            balance_E,
            self._slopes_BE,
            sums_SE,
            self._rows,
            self._k,
            self._part,
            factor,
            self._experts,
            ROUTED,
            self._places,
            triton.next_power_of_2(self._k),
            num_warps=4,
        )
        return self._slopes_BE, sums_SE.sum(0)
