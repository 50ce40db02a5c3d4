"""Switch: each token is encoded by one of several small experts (Mudide et al. 2024, arXiv 2410.08201)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.interface import Latents, Losses, Reduce, one_process
from plmsae_cli.sae.selection import encode_top_k, top_k
from plmsae_cli.sae.sparse import Pairs, attach_encoder, sparse_decode

TILE = 128


class Switch(Dictionary):
    """p = softmax(W_r (x - b_r));  i = argmax p;  z = p_i ReLU(TopK_k(a of expert i));  xhat = z W_dec + b_dec.

    Expert i has the latents from i N / E on, N / E of them: a token costs an E-th of TopK's encoder. Forward and
    backward touch no other expert's latents.
    """

    def __init__(
        self, d: int, num_latents: int, k: int, num_experts: int = 8, balance_coefficient: float = 3.0
    ) -> None:
        """`balance_coefficient`: weight of the load balance beside the squared error a dimension.

        Raises ValueError where experts cannot have equally many latents, or fewer than k.
        """
        super().__init__(d, num_latents)
        self.k = k
        self.num_experts = num_experts
        self.balance_coefficient = balance_coefficient
        if num_latents % num_experts:
            raise ValueError(
                f"{num_latents} latents do not split into {num_experts} experts: "
                f"choose a multiple of num_experts, such as {-(-num_latents // num_experts) * num_experts}"
            )
        self.expert_latents = num_latents // num_experts
        if not 1 <= k <= self.expert_latents:
            raise ValueError(
                f"k = {k} active of {self.expert_latents} latents an expert: choose k from 1 to {self.expert_latents}"
            )
        self.w_router_ED = nn.Parameter(torch.zeros(num_experts, d))
        self.b_router_D = nn.Parameter(torch.zeros(d))

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""
        return {
            "d": self.d,
            "num_latents": self.num_latents,
            "k": self.k,
            "num_experts": self.num_experts,
            "balance_coefficient": self.balance_coefficient,
        }

    @torch.no_grad()
    def start_(self, generator: torch.Generator) -> None:
        """The router starts at random, centred as the decoder is."""
        noise_ED = torch.rand(self.w_router_ED.shape, generator=generator) * 2 - 1
        self.w_router_ED.copy_(noise_ED / math.sqrt(self.d))
        self.b_router_D.copy_(self.b_dec_D)

    def flops_per_token(self) -> float:
        """The router's product and its gradients; one expert's encoder; at k latents decoding and three gradients."""
        return float((6 * self.num_experts + 2 * self.expert_latents + 8 * self.k) * self.d)

    def step_bytes(self, rows: int) -> int:
        """Pre-activations of one expert a token, and an expert's encoder a tile."""
        tiles = rows // TILE + self.num_experts
        return (3 * rows + tiles * self.d) * self.expert_latents * 4

    def start_latents(self, x_BD: Tensor) -> Latents | None:
        """The k largest latents of each token's expert."""
        return self.encode(x_BD)

    def encode(self, x_BD: Tensor) -> Latents:
        """The k largest latents of each token's expert, times the router's probability of it."""
        chosen_B, probability_B, _ = self._route(x_BD)
        selected = self._select(x_BD, chosen_B)
        pairs = Pairs.of_rows(selected.indices_BK, self.num_latents)
        acts_BK = self._attach(selected, x_BD, pairs).view_as(selected.acts_BK)
        return Latents(acts_BK * probability_B.unsqueeze(1), selected.indices_BK)

    def loss(self, x_BD: Tensor, dead_N: Tensor, global_rows: int, reduce: Reduce = one_process) -> Losses:
        """sum ||x - xhat||^2 / (B_global d) + balance_coefficient E sum_i f_i P_i.

        f_i is the share of the global batch's tokens that expert i gets, P_i its mean probability over them;
        `aux` is E sum f P, 1 where the load is even.
        """
        chosen_B, probability_B, probabilities_BE = self._route(x_BD)
        selected = self._select(x_BD, chosen_B)
        pairs = Pairs.of_rows(selected.indices_BK, self.num_latents)
        acts_P = self._attach(selected, x_BD, pairs) * probability_B.repeat_interleave(self.k)
        xhat_BD = sparse_decode(acts_P, self.w_dec_ND, pairs) + self.b_dec_D
        reconstruction = (xhat_BD - x_BD).square().sum() / (global_rows * self.d)

        experts_E = torch.arange(self.num_experts, device=x_BD.device)
        tokens_E = reduce((chosen_B.unsqueeze(1) == experts_E).sum(0))
        balance = self.num_experts * (tokens_E * probabilities_BE.sum(0)).sum() / global_rows**2
        total = reconstruction + self.balance_coefficient * balance
        acts_P = acts_P.detach()
        return Losses(total, reconstruction, balance, pairs.fired(acts_P), pairs.active(acts_P), xhat_BD.detach())

    @torch.no_grad()
    def fold_(self, mean_D: Tensor, scale: float) -> None:
        """From the input (x - mean) * scale to raw activations x, in place; the router decides as before."""
        super().fold_(mean_D, scale)
        self.w_router_ED.mul_(scale)
        self.b_router_D.div_(scale).add_(mean_D)

    def _route(self, x_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each token's expert, the probability of it, and those of all experts."""
        # In low precision many tokens would tie between experts.
        with torch.autocast(x_BD.device.type, enabled=False):
            logits_BE = F.linear(x_BD - self.b_router_D, self.w_router_ED)
        probabilities_BE = logits_BE.softmax(1)
        chosen_B = top_k(probabilities_BE.detach(), 1).indices_BK.squeeze(1)
        return chosen_B, probabilities_BE.gather(1, chosen_B.unsqueeze(1)).squeeze(1), probabilities_BE

    @torch.no_grad()
    def _select(self, x_BD: Tensor, chosen_B: Tensor) -> Latents:
        """The k largest latents of each token's expert, ReLU applied, by their index in the dictionary."""
        by_experts = _by_tiles if x_BD.is_cuda else _by_loop
        w_enc_END = self.w_enc_ND.view(self.num_experts, self.expert_latents, self.d)
        b_enc_EN = self.b_enc_N.view(self.num_experts, self.expert_latents)
        selected = by_experts(x_BD - self.b_dec_D, chosen_B, w_enc_END, b_enc_EN, self.k)
        return Latents(selected.acts_BK, selected.indices_BK + chosen_B.unsqueeze(1) * self.expert_latents)

    def _attach(self, selected: Latents, x_BD: Tensor, pairs: Pairs) -> Tensor:
        acts_P = selected.acts_BK.flatten()
        return attach_encoder(acts_P, x_BD, self.w_enc_ND, self.b_enc_N, self.b_dec_D, pairs)


def _by_loop(x_BD: Tensor, chosen_B: Tensor, w_END: Tensor, b_EN: Tensor, k: int) -> Latents:
    """One product an expert, of the tokens that chose it; waits for their number."""
    acts_BK = x_BD.new_empty(len(x_BD), k)
    indices_BK = chosen_B.new_empty(len(x_BD), k)
    order_B = chosen_B.argsort(stable=True)
    counts: list[int] = torch.bincount(chosen_B, minlength=len(w_END)).tolist()
    for expert, rows in enumerate(torch.split(order_B, counts)):
        if rows.numel():
            acts_BK[rows], indices_BK[rows] = encode_top_k(x_BD[rows], w_END[expert], b_EN[expert], k)
    return Latents(acts_BK, indices_BK)


def _by_tiles(x_BD: Tensor, chosen_B: Tensor, w_END: Tensor, b_EN: Tensor, k: int, tile: int = TILE) -> Latents:
    """One batched product over tiles of tokens of the same expert, each expert's last tile filled up.

    There are at most B / tile + E tiles, however tokens choose: nothing is dropped, and no number is waited for.
    Against a fixed capacity an expert, that costs a copy of its encoder for each of its tiles.
    """
    rows, experts = len(x_BD), len(w_END)
    num_tiles = rows // tile + experts
    order_B = chosen_B.argsort(stable=True)
    counts_E = torch.zeros(experts, dtype=torch.int64, device=x_BD.device)
    counts_E.scatter_add_(0, chosen_B, torch.ones_like(chosen_B))
    tiles_E = (counts_E + tile - 1) // tile
    last_E = tiles_E.cumsum(0)
    # Where the tokens, in order of expert, lie in the tiles.
    sorted_B = chosen_B[order_B]
    first_B = (counts_E.cumsum(0) - counts_E)[sorted_B]
    place_B = (last_E - tiles_E)[sorted_B] * tile + torch.arange(rows, device=x_BD.device) - first_B
    tiles_TD = x_BD.new_zeros(num_tiles * tile, x_BD.shape[1]).index_copy_(0, place_B, x_BD[order_B])
    tile_numbers = torch.arange(num_tiles, device=x_BD.device)
    expert_T = torch.searchsorted(last_E, tile_numbers, right=True).clamp(max=experts - 1)
    scores = torch.baddbmm(
        b_EN[expert_T].unsqueeze(1), tiles_TD.view(num_tiles, tile, -1), w_END[expert_T].transpose(1, 2)
    )
    acts_TK, indices_TK = top_k(scores.view(num_tiles * tile, -1), k)
    back_B = torch.empty_like(order_B).index_copy_(0, order_B, place_B)
    return Latents(acts_TK[back_B], indices_TK[back_B])
