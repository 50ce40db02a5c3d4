"""The strongest latents of whole proteins. Letters: P proteins, T latents listed for each, R residues, K active latents of a
residue, N latents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from plmsae_cli.sae.interface import Latents
from plmsae_cli.sae.selection import top_k

PAIRS = 1 << 25
"""Pairs of a protein and a latent that are ranked together, some 30 bytes each: a group of short peptides has many proteins."""


class Strongest(NamedTuple):
    """By protein, the largest share of its maximum first, equal ones by number; on the CPU."""

    latent_PT: Tensor
    share_PT: Tensor
    """Activation / maximum; 0 where a protein has fewer latents than T."""
    activation_PT: Tensor
    residue_PT: Tensor
    """The first residue (from 1) at which the latent is largest."""


def strongest(latents: Latents, maximum_N: Tensor, number: int, lengths: Tensor) -> Strongest:
    """Of proteins of these lengths [P], one after the other; a latent whose maximum is 0 counts by its activation."""
    parts, begin = [], 0
    for some in torch.split(lengths, max(1, PAIRS // len(maximum_N))):
        end = begin + int(some.sum())
        theirs = Latents(latents.acts_BK[begin:end], latents.indices_BK[begin:end])
        parts.append(_strongest(theirs, maximum_N, number, some))
        begin = end
    return Strongest(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _strongest(latents: Latents, maximum_N: Tensor, number: int, lengths: Tensor) -> Strongest:
    device, width = maximum_N.device, len(maximum_N)
    number, proteins, rows = min(number, width), len(lengths), len(latents.acts_BK)
    lengths = lengths.to(device)
    owner_R = torch.arange(proteins, device=device).repeat_interleave(lengths, output_size=rows)
    key_RK = owner_R[:, None] * width + latents.indices_BK
    best_PN = torch.zeros(proteins * width, device=device)
    best_PN.scatter_reduce_(0, key_RK.flatten(), latents.acts_BK.flatten(), "amax")
    share_PN = best_PN.view(proteins, width) / torch.where(maximum_N > 0, maximum_N, 1.0)
    share_PT, which_PT = top_k(share_PN, number)

    slots = proteins * number
    slot_PN = torch.full((proteins, width), slots, device=device)
    slot_PN.scatter_(1, which_PT, torch.arange(slots, device=device).view(proteins, number))
    slot_RK = torch.where(latents.acts_BK == best_PN[key_RK], slot_PN.view(-1)[key_RK], slots)
    row_RK = torch.arange(rows, device=device)[:, None].expand_as(slot_RK)
    first = torch.full((slots + 1,), rows, device=device)
    first.scatter_reduce_(0, slot_RK.flatten(), row_RK.flatten(), "amin")
    begin_P1 = (lengths.cumsum(0) - lengths)[:, None]
    residue_PT = first[:-1].view(proteins, number) - begin_P1 + 1
    acts_PT = best_PN.view(proteins, width).gather(1, which_PT)
    return Strongest(*(t.cpu() for t in (which_PT, share_PT, acts_PT, residue_PT)))
