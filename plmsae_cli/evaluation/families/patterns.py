"""The shape of a latent's activation along proteins, after the classes of InterProt (Adams et al. 2025), defined exactly.

A latent fires on a residue if its activation is strictly above 15 % of its maximum. A run is a stretch of consecutive residues of
one protein on which it fires, a gap the distance between the starts of two consecutive runs in one protein. In this order:

    dead      never fires
    whole     fires on more than 80 % of the residues of the proteins in which it fires, taken together
    periodic  at least 10 gaps, more than half of them of the same length of 2 to 60 residues, and a median run of at most 20
    point     the median run is 1 residue
    short     2 to 20
    medium    21 to 50
    long      more

The median run is the least length that at least half of the runs do not exceed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plmsae_cli.sae.interface import Latents

FIRES = 0.15
PATTERNS = ("dead", "whole", "periodic", "point", "short", "medium", "long")
LONGEST_GAP = 60
_EDGES = (1, 20, 50)
_WHOLE, _GAPS = 0.8, 10


class Patterns:
    """Integer counts, which merge by addition: `runs_N4` by length, `gaps_NG` by distance (0 for longer ones), `active_N`
    residues, `length_N` residues of the proteins in which a latent fires."""

    def __init__(self, num_latents: int, device: torch.device | str = "cpu") -> None:
        self.runs_N4 = torch.zeros(num_latents, len(_EDGES) + 1, dtype=torch.int64, device=device)
        self.gaps_NG = torch.zeros(num_latents, LONGEST_GAP + 1, dtype=torch.int64, device=device)
        self.active_N = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self.length_N = torch.zeros(num_latents, dtype=torch.int64, device=device)

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("runs_N4", "gaps_NG", "active_N", "length_N")}

    @torch.no_grad()
    def add(self, latents: Latents, maximum_N: Tensor, lengths: Tensor) -> None:
        """Count a batch of whole proteins of these lengths [P], one after the other."""
        fires_RK = latents.acts_BK > FIRES * maximum_N[latents.indices_BK]
        device, rows = fires_RK.device, len(fires_RK)
        protein_R = torch.arange(len(lengths), device=device).repeat_interleave(lengths.to(device), output_size=rows)
        # Places with a hole between proteins, so that no run crosses from one into the next.
        place_R = torch.arange(rows, device=device) + protein_R
        span = rows + len(lengths) + 1
        beyond = len(maximum_N) * span
        key = torch.where(fires_RK, latents.indices_BK * span + place_R[:, None], beyond).flatten().sort()[0]
        valid = key < beyond
        before = torch.cat([key.new_full((1,), -2), key[:-1]])
        begins = valid & (key != before + 1)
        run = (begins.cumsum(0) - 1).clamp(min=0)
        length_J = torch.zeros_like(key).index_add_(0, run, valid.long())
        start_J = torch.full_like(key, beyond).scatter_reduce_(0, run, torch.where(valid, key, beyond), "amin")
        there_J = start_J < beyond
        latent_J = torch.where(there_J, start_J // span, 0)
        one_J = there_J.long()

        owner = torch.zeros(span, dtype=torch.int64, device=device)
        owner[place_R] = protein_R
        protein_J = torch.where(there_J, owner[start_J % span], -1)
        edges = torch.tensor(_EDGES, device=device)
        bin_J = torch.searchsorted(edges, length_J)
        self.runs_N4.view(-1).index_add_(0, latent_J * (len(_EDGES) + 1) + bin_J, one_J)
        self.active_N.index_add_(0, latent_J, length_J * one_J)
        again = torch.zeros_like(there_J)
        again[1:] = there_J[1:] & (latent_J[1:] == latent_J[:-1]) & (protein_J[1:] == protein_J[:-1])
        length_of = lengths.to(device)[protein_J.clamp(min=0)]
        self.length_N.index_add_(0, latent_J, length_of * (there_J & ~again).long())
        gap_J = torch.zeros_like(start_J)
        gap_J[1:] = start_J[1:] - start_J[:-1]
        gap_J = torch.where(again & (gap_J <= LONGEST_GAP), gap_J, 0)
        self.gaps_NG.view(-1).index_add_(0, latent_J * (LONGEST_GAP + 1) + gap_J, again.long())

    def classes(self) -> Tensor:
        """The place in PATTERNS of each latent [N]."""
        runs_N = self.runs_N4.sum(1)
        below_N4 = 2 * self.runs_N4.cumsum(1) >= runs_N[:, None]
        median_N = below_N4.long().argmax(1)  # the first edge that half of the runs stay below
        gaps_N = self.gaps_NG.sum(1)
        common_N = self.gaps_NG[:, 2:].amax(1)
        regular_N = (gaps_N >= _GAPS) & (2 * common_N > gaps_N) & (median_N <= 1)
        found_N = PATTERNS.index("point") + median_N
        found_N = torch.where(regular_N, PATTERNS.index("periodic"), found_N)
        found_N = torch.where(self.active_N > _WHOLE * self.length_N, PATTERNS.index("whole"), found_N)
        return torch.where(runs_N == 0, PATTERNS.index("dead"), found_N)
