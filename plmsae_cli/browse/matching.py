"""The same latent in another dictionary: by the direction it writes, and by the residues on which it fires.

Letters: N latents of the first dictionary, M of the second, D dimensions, R residues, K active latents of a residue.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plmsae_cli.sae.interface import Latents

TILE = 2048
PAIRS = 1 << 25
"""Pairs of latents, active on one residue, that are held at a time."""


def best_cosine(w_dec_ND: Tensor, w_dec_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of the first the nearest row of the second: its number, and the cosine, [N] each."""
    first, second = (torch.nn.functional.normalize(w.float(), dim=1) for w in (w_dec_ND, w_dec_MD))
    parts = [(tile @ second.T).max(1) for tile in torch.split(first, TILE)]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def best_correlation(x: Latents, y: Latents, num_x: int, num_y: int) -> tuple[Tensor, Tensor]:
    """Of each latent of x [R, K] the latent of y [R, K'] whose activations on the same residues correlate best with its own.

    Pearson's r = (sum xy - R mean(x) mean(y)) / (R sd(x) sd(y)), in float64. Where both are never active together r is at
    most 0; a latent of x that meets none has number -1 and r 0.
    """
    rows = len(x.acts_BK)
    mean_N, sd_N = _moments(x, num_x)
    mean_M, sd_M = _moments(y, num_y)
    step = max(1, PAIRS // (x.acts_BK.shape[1] * y.acts_BK.shape[1]))
    keys, sums = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        product = x.acts_BK[part, :, None].double() * y.acts_BK[part, None, :].double()
        key = x.indices_BK[part, :, None].long() * num_y + y.indices_BK[part, None, :].long()
        both = product > 0
        keys, place = torch.unique(torch.cat([keys, key[both]]), return_inverse=True)
        sums = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, place, torch.cat([sums, product[both]]))
    i_P, j_P = keys // num_y, keys % num_y
    r_P = (sums / rows - mean_N[i_P] * mean_M[j_P]) / (sd_N[i_P] * sd_M[j_P]).clamp(min=1e-30)
    # By latent, and of equals the smallest number first: both sorts are stable and keys ascend.
    order = torch.argsort(r_P, descending=True, stable=True)
    order = order[torch.argsort(i_P[order], stable=True)]
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = i_P[order][1:] != i_P[order][:-1]
    best = order[first]
    number_N, value_N = torch.full((num_x,), -1), torch.zeros(num_x)
    number_N[i_P[best]], value_N[i_P[best]] = j_P[best], r_P[best].float()
    return number_N, value_N


def _moments(latents: Latents, number: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over residues, float64 [N]."""
    rows, acts, where = len(latents.acts_BK), latents.acts_BK.double().flatten(), latents.indices_BK.flatten().long()
    mean_N = torch.zeros(number, dtype=torch.float64).index_add_(0, where, acts) / rows
    square_N = torch.zeros(number, dtype=torch.float64).index_add_(0, where, acts * acts) / rows
    return mean_N, (square_N - mean_N * mean_N).clamp(min=0).sqrt()
