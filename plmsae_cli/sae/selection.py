"""The k largest latents of each token, exactly, with ties to the lowest index.

`torch.topk` leaves ties open and walks all N scores. Here scores are first reduced to the maxima of small
groups of neighbouring latents: the k groups with the largest maxima contain the k largest scores, so two
short searches replace one long one. Each search ranks 64-bit keys, the score's bits above the inverted index,
which makes the order total: equal scores choose the same latents on every device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from plmsae_cli.sae.interface import Latents

# Pre-activations held at once. A tile that fits a CPU's cache is read back for free; on a GPU only memory
# counts.
TILE_SCORES_CPU = 2**21
TILE_SCORES_CUDA = 2**28
_INDEX_MASK = 2**32 - 1


def top_k(scores_BN: Tensor, k: int, ordered: bool = True) -> Latents:
    """ReLU of the k largest scores of each row, in decreasing order if `ordered`, ties to the lowest index.

    Scores at or below 0 all tie at 0; NaN is above all. float32 or narrower, k <= N. Not differentiable.
    """
    rows, num_latents = scores_BN.shape
    members = _members(num_latents, k)
    return _select(scores_BN.view(rows, num_latents // members, members).transpose(1, 2), k, ordered)


def active_latents(z_BN: Tensor) -> Latents:
    """The activations above 0 of each row of a dense `z_BN` (float32, at least 0), in decreasing order.

    K is the largest number of them in a row, so a GPU is waited for. Differentiable.
    """
    k = max(1, int((z_BN > 0).sum(1).max()))
    indices_BK = top_k(z_BN.detach(), k).indices_BK
    return Latents(z_BN.gather(1, indices_BK), indices_BK)


@torch.no_grad()
def encode_top_k(x_BD: Tensor, w_enc_ND: Tensor, b_enc_N: Tensor, k: int) -> Latents:
    """`top_k(x W_enc^T + b_enc, k)`, holding no more than a tile of the pre-activations."""
    num_latents, d = w_enc_ND.shape
    members = _members(num_latents, k)
    groups = num_latents // members
    # The encoder's rows are reordered so that a group's scores lie `groups` apart: the maximum over a group
    # then is one over whole vectors, five times as fast on a CPU as over neighbouring scores.
    w_ND = w_enc_ND.view(groups, members, d).transpose(0, 1).reshape(num_latents, d)
    b_N = b_enc_N.view(groups, members).t().reshape(num_latents)

    rows = x_BD.shape[0]
    tile = max(1, (TILE_SCORES_CUDA if x_BD.is_cuda else TILE_SCORES_CPU) // num_latents)
    # On a CPU, one buffer for all tiles: touching fresh pages costs half as much as the product itself.
    buffer_TN = None if x_BD.is_cuda else x_BD.new_empty(min(tile, rows), num_latents)
    acts_BK = x_BD.new_empty(rows, k)
    indices_BK = torch.empty(rows, k, dtype=torch.int64, device=x_BD.device)
    for start in range(0, rows, tile):
        stop = min(start + tile, rows)
        if buffer_TN is None:
            scores_TN = F.linear(x_BD[start:stop], w_ND, b_N)
        else:
            scores_TN = torch.addmm(b_N, x_BD[start:stop], w_ND.t(), out=buffer_TN[: stop - start])
        selected = _select(scores_TN.view(-1, members, groups), k)
        acts_BK[start:stop], indices_BK[start:stop] = selected
    return Latents(acts_BK, indices_BK)


def _members(num_latents: int, k: int) -> int:
    """Latents a group: a power of two near sqrt(N / k), so that both searches are as long, that divides N.

    Groups of fewer than four save nothing.
    """
    wanted = 1 << int(math.log2(math.sqrt(num_latents / k)))
    members = math.gcd(wanted, num_latents)
    return members if members >= 4 else 1


def _select(scores_BMG: Tensor, k: int, ordered: bool = True) -> Latents:
    """Scores of M members in each of G groups; latent i is member i % M of group i // M."""
    rows, members, groups = scores_BMG.shape
    device = scores_BMG.device
    group_G = torch.arange(groups, device=device)
    if members == 1:
        keys_BK = _largest_keys(scores_BMG.squeeze(1), group_G, k, ordered)
    else:
        groups_B1K = _index(_largest_keys(scores_BMG.amax(1), group_G, k, ordered=False)).unsqueeze(1)
        candidates_BMK = scores_BMG.gather(2, groups_B1K.expand(-1, members, -1))
        latents_BMK = groups_B1K * members + torch.arange(members, device=device).unsqueeze(1)
        keys_BK = _largest_keys(candidates_BMK.view(rows, -1), latents_BMK.view(rows, -1), k, ordered)
    acts_BK = (keys_BK >> 32).to(torch.int32).view(torch.float32)
    return Latents(acts_BK, _index(keys_BK))


def _largest_keys(scores: Tensor, index: Tensor, k: int, ordered: bool) -> Tensor:
    """The k largest of bits(ReLU(score)) << 32 | inverted index; floats >= 0 rank as their bits do."""
    bits = scores.relu().float().view(torch.int32).bitwise_and(0x7FFFFFFF)  # drops the sign of -0 and of NaN
    keys = bits.to(torch.int64).bitwise_left_shift_(32).bitwise_or_(_INDEX_MASK - index)
    return keys.topk(k, dim=1, sorted=ordered).values


def _index(keys: Tensor) -> Tensor:
    return _INDEX_MASK - (keys & _INDEX_MASK)
