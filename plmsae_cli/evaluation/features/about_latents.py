"""What is told of a latent besides its examples: what its decoder row does and is near to, and what fires with it.

Letters: N latents, C latents of a chunk, D dimensions, A amino acids, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plmsae_cli.evaluation.features import layout
from plmsae_cli.plm.alphabet import AMINO_ACIDS, FIRST_LETTER
from plmsae_cli.plm.esm2 import ESM2
from plmsae_cli.plm.unet import UNet
from plmsae_cli.sae.selection import top_k

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@torch.inference_mode()
def letter_effects(plm: ESM2 | UNet, layer: int, mean_D: Tensor, added_CD: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, row_logits) [C, 20]: log-probabilities among the amino acids at mean + added minus those at the mean, and those of
    the added vector alone, centred.

    From a layer before the last, the stream goes to the final norm at once: the direct path of the residual connections,
    without what later blocks make of it. That is exact at the last layer alone.
    """
    letters = slice(FIRST_LETTER, FIRST_LETTER + len(AMINO_ACIDS))

    def log_letters(x_BD: Tensor) -> Tensor:
        if not isinstance(plm, UNet) and layer < plm.config.num_layers:
            x_BD = plm.emb_layer_norm_after(x_BD)
        return plm.head(x_BD)[:, letters].log_softmax(1)

    alone_CA = log_letters(added_CD)
    return log_letters(mean_D + added_CD) - log_letters(mean_D[None]), alone_CA - alone_CA.mean(1, keepdim=True)


@torch.inference_mode()
def nearest_rows(unit_ND: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """(latents, cosines) [C, 10]: the rows, of norm 1, nearest to each of rows [first, last); cosine 0 where none is above."""
    cosine_CN = unit_ND[first:last] @ unit_ND.T
    own_C = torch.arange(last - first, device=unit_ND.device)
    cosine_CN[own_C, own_C + first] = 0.0
    found = top_k(cosine_CN, min(layout.NEIGHBOURS, len(unit_ND)))
    return found.indices_BK, found.acts_BK


class Together:
    """What fires beside latents [first, last), from pairs (latent, other) at a sample of each latent's firings."""

    def __init__(self, latent_X: Ints, other_X: Ints, sampled_N: Ints, firing_N: Ints) -> None:
        num_latents = len(firing_N)
        pair_U, count_U = np.unique(latent_X * num_latents + other_X, return_counts=True)
        self.latent_U, self.other_U = pair_U // num_latents, pair_U % num_latents
        self.share_U = count_U / sampled_N[self.latent_U]
        mine_U, its_U = firing_N[self.latent_U], firing_N[self.other_U]
        # An estimate from a sample may exceed what is possible.
        both_U = np.minimum(self.share_U * mine_U, its_U)
        self.jaccard_U = both_U / (mine_U + its_U - both_U)

    def most(self, first: int, last: int) -> list[dict[str, Any]]:
        """For each latent of the range `together`, `together_shares` and `together_jaccard`."""
        order = np.lexsort((self.other_U, -self.jaccard_U, self.latent_U))
        ends = np.searchsorted(self.latent_U[order], np.arange(first, last + 1))
        found = []
        for start, stop in pairwise(ends):
            chosen = order[start : min(stop, start + layout.NEIGHBOURS)]
            found.append(
                {
                    "together": self.other_U[chosen].tolist(),
                    "together_shares": self.share_U[chosen].tolist(),
                    "together_jaccard": self.jaccard_U[chosen].tolist(),
                }
            )
        return found

    def parents(self, first: int, last: int, prefixes: Sequence[int]) -> list[dict[str, Any]]:
        """For each latent of the range `parent` and `parent_share`: the most frequent other of smaller prefixes."""
        ends = np.asarray(prefixes)
        smaller = np.searchsorted(ends, self.other_U, side="right") < np.searchsorted(ends, self.latent_U, side="right")
        smaller &= (self.latent_U >= first) & (self.latent_U < last)
        latent_V, other_V, share_V = self.latent_U[smaller], self.other_U[smaller], self.share_U[smaller]
        order = np.lexsort((other_V, -share_V, latent_V))
        names, starts = np.unique(latent_V[order], return_index=True)
        found: list[dict[str, Any]] = [{"parent": None, "parent_share": None} for _ in range(last - first)]
        for name, start in zip(names.tolist(), starts.tolist(), strict=True):
            best = order[start]
            found[name - first] = {"parent": int(other_V[best]), "parent_share": float(share_V[best])}
        return found
