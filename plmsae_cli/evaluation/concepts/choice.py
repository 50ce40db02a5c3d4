"""Choosing on validation, scoring on test: the best latent of each concept and the best concepts of each latent.

Letters: C concepts, N latents, T thresholds, H halves (0 validation, 1 test), L concepts listed for a latent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from plmsae_cli.evaluation.concepts.scores import scores

LISTED = 10
"""Concepts kept for a latent."""


@dataclass
class Best:
    """Frozen choices and what they score. `F1` by half: [:, 0] is validation."""

    latent_C: Tensor
    threshold_C: Tensor
    """Which of the thresholds."""
    precision_CH: Tensor
    recall_CH: Tensor
    f1_CH: Tensor
    concept_NL: Tensor
    """The concepts with the largest validation F1 for each latent, -1 where there are fewer."""
    listed_threshold_NL: Tensor
    listed_precision_NLH: Tensor
    listed_recall_NLH: Tensor
    listed_f1_NLH: Tensor


def choose(
    chunks: Iterable[tuple[int, Tensor, Tensor]],
    fired_HNT: Tensor,
    total_CH: Tensor,
    rankable_C: Tensor,
    again: bool = False,
) -> Best:
    """The pair (latent, threshold) with the largest F1 on validation for each concept, and the same for each latent.

    Both are then fixed and scored on test. The first of equals wins: the lower latent, then the lower threshold.

    Args:
        chunks: (first concept, hits, found) of consecutive concepts [Cc, H, N, T]; found as `scores` takes it.
        fired_HNT: residues on which each latent fires.
        total_CH: instances or residues of each concept by half.
        rankable_C: bool, the concepts that may be listed for a latent (amino acids are not).
        again: choose the threshold a second time, on test (the published procedure; too good by construction).
    """
    num_latents, num_thresholds = fired_HNT.shape[1:]
    listed = (torch.zeros(num_latents, 0), torch.zeros(num_latents, 0, dtype=torch.int64))
    details: list[Tensor] = [torch.zeros(num_latents, 0, 2, 3, dtype=torch.float64), torch.zeros(num_latents, 0).long()]
    best: list[tuple[int, int, list[list[float]]]] = []
    for first, hits_CHNT, found_CHNT in chunks:
        for offset in range(len(hits_CHNT)):
            concept = first + offset
            total_H11 = total_CH[concept][:, None, None]
            scored = scores(hits_CHNT[offset], fired_HNT, found_CHNT[offset], total_H11)
            f1_NT = scored[2][0]
            place = int(f1_NT.flatten().argmax())
            latent, threshold = divmod(place, num_thresholds)
            test = int(scored[2][1, latent].argmax()) if again else threshold
            best.append(
                (latent, threshold, [[float(s[h, latent, t]) for s in scored] for h, t in ((0, threshold), (1, test))])
            )
            if not bool(rankable_C[concept]):
                continue
            value_N, threshold_N = f1_NT.max(1)
            every_N = torch.arange(num_latents, device=f1_NT.device)
            test_N = scored[2][1].max(1)[1] if again else threshold_N
            picked_N23 = torch.stack(
                [torch.stack([s[h, every_N, t] for s in scored], -1) for h, t in ((0, threshold_N), (1, test_N))], 1
            )
            listed, details = _insert(listed, details, value_N, concept, threshold_N, picked_N23)
    return _best(best, listed, details)


def _insert(
    listed: tuple[Tensor, Tensor],
    details: list[Tensor],
    value_N: Tensor,
    concept: int,
    threshold_N: Tensor,
    picked_N23: Tensor,
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Put one concept into each latent's list, which stays ordered and at most LISTED long; equals keep their order."""
    value_NL = torch.cat([listed[0].to(value_N), value_N[:, None]], 1)
    concept_NL = torch.cat([listed[1].to(value_N.device), torch.full_like(threshold_N, concept)[:, None]], 1)
    order_NL = value_NL.sort(dim=1, descending=True, stable=True)[1][:, :LISTED]
    threshold_NL = torch.cat([details[1].to(value_N.device), threshold_N[:, None]], 1).gather(1, order_NL)
    picked = torch.cat([details[0].to(value_N.device), picked_N23[:, None]], 1)
    picked = picked.gather(1, order_NL[:, :, None, None].expand(-1, -1, 2, 3))
    return (value_NL.gather(1, order_NL), concept_NL.gather(1, order_NL)), [picked, threshold_NL]


def _best(best: list[tuple[int, int, list[list[float]]]], listed: tuple[Tensor, Tensor], details: list[Tensor]) -> Best:
    scored_CH3 = torch.tensor([one[2] for one in best], dtype=torch.float64).view(-1, 2, 3)
    picked = details[0].cpu()
    found_NL = listed[0].cpu() > 0
    return Best(
        torch.tensor([one[0] for one in best], dtype=torch.int64),
        torch.tensor([one[1] for one in best], dtype=torch.int64),
        scored_CH3[..., 0],
        scored_CH3[..., 1],
        scored_CH3[..., 2],
        torch.where(found_NL, listed[1].cpu(), -1),
        details[1].cpu(),
        picked[..., 0],
        picked[..., 1],
        picked[..., 2],
    )
