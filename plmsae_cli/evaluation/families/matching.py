"""Latents against classes of proteins by the largest activation in each protein.

Letters: n latents of a tile, P proteins, L classes, M candidate classes of a latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plmsae_cli.evaluation.concepts.scores import f1, scores

CANDIDATES = 5
"""Classes tried for a latent: those most frequent among its top proteins."""
TILE, PAIR = 1 << 25, 70
"""Pairs of a latent and a protein that are matched together, and bytes of a pair, all of the process: 2.3 GB."""
BOOTSTRAPS = 1000


@dataclass
class Match:
    """For each latent its class (-1 for none), the threshold, and scores on train and test."""

    class_N: Tensor
    threshold_N: Tensor
    f1_train_N: Tensor
    precision_N: Tensor
    recall_N: Tensor
    f1_N: Tensor
    hits_N: Tensor
    """Test proteins of the class that are found; `fired_N` that are found, `total_N` of the class."""
    fired_N: Tensor
    total_N: Tensor


def tile_latents(proteins: int, labels: int, top: int) -> int:
    """How many latents are matched at a time, so that memory does not grow with proteins, latents or classes."""
    return max(1, TILE // max(1, proteins, top * labels))


def intervals(match: Mapping[str, Tensor], latents: Sequence[int], proteins: int, seed: int) -> list[list[float]]:
    """95 % bootstrap intervals over test proteins of these latents' F1.

    A protein is a hit, a false find, a miss or none of them, so drawing proteins with replacement draws the numbers of the
    four from a multinomial.
    """
    found = []
    for n in latents:
        hits, fired, total = (int(match[f"{key}_N"][n]) for key in ("hits", "fired", "total"))
        share = np.array([hits, fired - hits, total - hits, proteins - fired - total + hits]) / proteins
        drawn = torch.from_numpy(np.random.default_rng([seed, n]).multinomial(proteins, share, BOOTSTRAPS)).double()
        hit_Q, false_Q, missed_Q = drawn[:, 0], drawn[:, 1], drawn[:, 2]
        f1_Q = f1(_share(hit_Q, hit_Q + false_Q), _share(hit_Q, hit_Q + missed_Q))
        found.append(torch.quantile(f1_Q, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())
    return found


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.nan_to_num(part / whole, nan=0.0)


@torch.no_grad()
def match(acts_nP: Tensor, y_PL: Tensor, test_P: Tensor, top: int | None) -> Match:
    """The class that each latent marks best.

    Strict: the candidates are the five classes most frequent among the `top` train proteins in which the latent is
    strongest (ties to the lower class); these are then left out, the threshold and the class are chosen on the other
    train proteins and scored on test. As published, with `top` None: the candidates are classes of the single strongest
    protein of all, at most five, and no protein is left out. A protein counts as found if the latent's activation in it
    is at least the threshold, which is positive.

    Args:
        acts_nP: largest activation of each latent in each protein, at least 0.
        y_PL: bool.
        test_P: bool, the half that scores.
        top: proteins that name candidates and are left out; None for the published procedure.
    """
    train = (~test_P).nonzero(as_tuple=True)[0]
    pool = train if top is not None else torch.arange(len(test_P), device=test_P.device)
    number = min(top or 1, len(pool))
    value_nT, place_nT = _top(acts_nP[:, pool], number)
    top_nT = pool[place_nT]
    votes_nL = (y_PL[top_nT] & (value_nT > 0)[..., None]).sum(1)
    votes_nM, class_nM = _top(votes_nL, min(CANDIDATES, y_PL.shape[1]))
    held_nP = torch.zeros_like(acts_nP, dtype=torch.bool)
    if top is not None:
        held_nP.scatter_(1, top_nT, True)
    use_nP = ~held_nP[:, train]
    train_nP = torch.where(use_nP, acts_nP[:, train], -1.0)
    ordered_nP, order_nP = train_nP.sort(dim=1, descending=True, stable=True)
    last_nP = torch.ones_like(use_nP)  # of its value: a threshold cannot part equals
    last_nP[:, :-1] = ordered_nP[:, :-1] != ordered_nP[:, 1:]
    best: Match | None = None
    for m in range(class_nM.shape[1]):
        class_n = class_nM[:, m]
        y_nP = y_PL.T[class_n]
        one = _fit(acts_nP, y_nP, y_nP[:, train] & use_nP, ordered_nP, order_nP, last_nP, test_P)
        one.class_N = torch.where((votes_nM[:, m] > 0) & (one.f1_train_N > 0), class_n, -1)
        best = one if best is None else _better(best, one)
    assert best is not None
    return best


def _top(values: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The largest, ties to the lower place."""
    ordered, place = values.sort(dim=1, descending=True, stable=True)
    return ordered[:, :number], place[:, :number]


def _fit(
    acts_nP: Tensor,
    y_nP: Tensor,
    train_y_nP: Tensor,
    ordered_nP: Tensor,
    order_nP: Tensor,
    last_nP: Tensor,
    test_P: Tensor,
) -> Match:
    hits_nP = train_y_nP.gather(1, order_nP).cumsum(1)
    found_nP = torch.arange(1, ordered_nP.shape[1] + 1, device=acts_nP.device).expand_as(hits_nP)
    total_n = train_y_nP.sum(1)
    f1_nP = scores(hits_nP, found_nP, hits_nP, total_n[:, None].clamp(min=1))[2]
    f1_nP = torch.where(last_nP & (ordered_nP > 0), f1_nP, 0.0)
    f1_train_n, place_n = f1_nP.max(1)
    threshold_n = ordered_nP.gather(1, place_n[:, None])[:, 0]
    fires_nP = acts_nP[:, test_P] >= threshold_n[:, None]
    truth_nP = y_nP[:, test_P]
    hits_n, fired_n, total_n = ((fires_nP & truth_nP).sum(1), fires_nP.sum(1), truth_nP.sum(1))
    precision_n, recall_n, f1_n = scores(hits_n, fired_n, hits_n, total_n)
    none_n = torch.empty_like(place_n)
    return Match(none_n, threshold_n, f1_train_n, precision_n, recall_n, f1_n, hits_n, fired_n, total_n)


def _better(one: Match, other: Match) -> Match:
    """The match with the larger F1 on train, the first of equals."""
    swap = (other.class_N >= 0) & ((one.class_N < 0) | (other.f1_train_N > one.f1_train_N))
    return Match(**{name: torch.where(swap, getattr(other, name), value) for name, value in vars(one).items()})
