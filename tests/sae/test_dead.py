from __future__ import annotations

import pytest
import torch

from plmsae_cli.sae.dead import DeadLatents, dead_window
from plmsae_cli.sae.interface import Latents
from plmsae_cli.sae.sparse import Pairs


def steps(seed: int) -> list[Latents]:
    """Ten steps of eight tokens with two latents of twenty each, some of them fillers."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(10):
        indices_BK = torch.stack([torch.randperm(20, generator=generator)[:2] for _ in range(8)])
        acts_BK = (torch.rand(8, 2, generator=generator) - 0.6).relu()
        found.append(Latents(acts_BK, indices_BK))
    return found


def by_hand(batches: list[Latents]) -> list[int]:
    age = [0] * 20
    for acts_BK, indices_BK in batches:
        fired = {int(i) for i, act in zip(indices_BK.flatten(), acts_BK.flatten(), strict=True) if act > 0}
        age = [0 if latent in fired else tokens + len(acts_BK) for latent, tokens in enumerate(age)]
    return age


def fired(latents: Latents, device: torch.device) -> torch.Tensor:
    """What a rank reports of its tokens."""
    acts_BK, indices_BK = (tensor.to(device) for tensor in latents)
    return Pairs.of_rows(indices_BK, 20).fired(acts_BK.flatten())


def handed_in(fired_N: torch.Tensor) -> torch.Tensor:
    """What a rank gives to the reduction."""
    seen: list[torch.Tensor] = []

    def reduce(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor)
        return tensor

    DeadLatents(20, fired_N.device).update(fired_N, 8, reduce)
    return seen[0]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_counters_are_global_tokens_at_any_world_size(world: int, device: torch.device) -> None:
    ranks = [DeadLatents(20, device) for _ in range(world)]
    batches = steps(0)
    for acts_BK, indices_BK in batches:
        parts = [
            fired(Latents(acts, indices), device)
            for acts, indices in zip(acts_BK.chunk(world), indices_BK.chunk(world), strict=True)
        ]
        summed = torch.stack([handed_in(part) for part in parts]).sum(0)
        for rank, part in zip(ranks, parts, strict=True):
            rank.update(part, 8, lambda _, summed=summed: summed)
    want = by_hand(batches)
    assert 0 < sum(tokens == 0 for tokens in want) < 20
    for rank in ranks:
        assert rank.tokens_since_fired_N.tolist() == want
        assert rank.tokens_since_fired_N.dtype == torch.int64


def test_mask_counts_tokens_not_steps() -> None:
    dead = DeadLatents(2)
    for _ in range(3):
        dead.update(torch.tensor([False, True]), 1000)
    assert dead.mask(3000).tolist() == [True, False]
    assert dead.mask(3001).tolist() == [False, False]


def test_window() -> None:
    assert dead_window(5_000_000) == 500_000
    assert dead_window(2_000_000_000) == 10_000_000
    assert dead_window(5) == 1, "not all latents from the start"
