from __future__ import annotations

from typing import Any

import pytest
import torch

from plmsae_cli.sae.fidelity import Fidelity, State
from plmsae_cli.sae.interface import Latents

NUM_LATENTS, D = 30, 6


def data(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Latents, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(rows, D, generator=generator) * 3 + 1
    xhat_BD = x_BD + torch.randn(rows, D, generator=generator) * torch.rand(rows, 1, generator=generator)
    indices_BK = torch.stack([torch.randperm(NUM_LATENTS - 4, generator=generator)[:5] for _ in range(rows)])
    acts_BK = (torch.rand(rows, 5, generator=generator) - 0.3).relu()
    return x_BD, xhat_BD, Latents(acts_BK, indices_BK), torch.ones(D)


def part(rows: slice, x_BD: torch.Tensor, xhat_BD: torch.Tensor, latents: Latents, mean_D: torch.Tensor) -> Any:
    return x_BD[rows], xhat_BD[rows], Latents(latents.acts_BK[rows], latents.indices_BK[rows]), mean_D


def same(ours: dict[str, Any], want: dict[str, Any]) -> None:
    assert ours.keys() == want.keys()
    for name, value in want.items():
        assert ours[name] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), name


def test_closed_form(device: torch.device) -> None:
    """Errors of norm 1 and 3 on points at distance 10 and 5 from the data's mean, not from the batch's."""
    x_BD = torch.tensor([[10.0, 1.0], [0.0, 6.0]])
    xhat_BD = torch.tensor([[10.0, 0.0], [0.0, 3.0]])
    latents = Latents(torch.tensor([[2.0, 0.0], [1.0, 4.0]]), torch.tensor([[2, 0], [1, 2]]))
    fidelity = Fidelity(4, device)
    fidelity.update(
        x_BD.to(device),
        xhat_BD.to(device),
        Latents(latents.acts_BK.to(device), latents.indices_BK.to(device)),
        torch.tensor([0.0, 1.0], device=device),
    )
    result = fidelity.result()
    assert result["tokens"] == 2
    assert result["fvu"] == pytest.approx((1 + 9) / (100 + 25), rel=1e-12)
    assert result["fvu_median"] == pytest.approx(1 / 100, rel=3e-3)  # of two tokens the lower
    assert result["mse"] == 5.0
    assert result["cosine"] == pytest.approx((100 / (101**0.5 * 10) + 1) / 2, rel=1e-12)
    assert result["l0_mean"] == 1.5
    assert result["l0_deciles"] == [1] * 6 + [2] * 5
    assert result["dead_share"] == 0.5
    assert result["density_histogram"] == {"never": 2, "-1": 1, "0": 1}
    assert fidelity.firing_N.tolist() == [0, 1, 2, 0]
    assert fidelity.maximum_N.tolist() == [0, 1, 4, 0]


def test_median_and_deciles_are_those_of_the_tokens() -> None:
    x_BD, xhat_BD, latents, mean_D = data(2001)
    fidelity = Fidelity(NUM_LATENTS)
    fidelity.update(x_BD, xhat_BD, latents, mean_D)
    ratio_B = (x_BD - xhat_BD).square().sum(1) / (x_BD - mean_D).square().sum(1)
    result = fidelity.result()
    assert result["fvu_median"] == pytest.approx(float(ratio_B.median()), rel=3e-3)
    l0_B = (latents.acts_BK > 0).sum(1).double()
    want = torch.quantile(l0_B, torch.linspace(0, 1, 11, dtype=torch.float64), interpolation="lower")
    assert result["l0_deciles"] == want.int().tolist()


@pytest.mark.parametrize("size", [1, 7, 64, 200])
def test_batches_do_not_matter(size: int) -> None:
    whole, split = Fidelity(NUM_LATENTS), Fidelity(NUM_LATENTS)
    batch = data(200)
    whole.update(*batch)
    for start in range(0, 200, size):
        split.update(*part(slice(start, start + size), *batch))
    same(split.result(), whole.result())
    assert torch.equal(split.maximum_N, whole.maximum_N)
    assert torch.equal(split.firing_N, whole.firing_N)


@pytest.mark.parametrize("world", [2, 4])
def test_world_size_does_not_matter(world: int) -> None:
    whole = Fidelity(NUM_LATENTS)
    batch = data(200)
    whole.update(*batch)
    ranks = [Fidelity(NUM_LATENTS) for _ in range(world)]
    for number, rank in enumerate(ranks):
        rank.update(*part(slice(number, None, world), *batch))
    states = [rank.state() for rank in ranks]
    reduced = State(
        torch.stack([state.sums for state in states]).sum(0),
        torch.stack([state.maximum_N for state in states]).amax(0),
    )
    for state in states:  # an all-reduce in place
        state.sums.copy_(reduced.sums)
        state.maximum_N.copy_(reduced.maximum_N)
    for rank in ranks:
        same(rank.result(), whole.result())
        assert torch.equal(rank.maximum_N, whole.maximum_N)


def test_merge() -> None:
    one, two, both = (Fidelity(NUM_LATENTS) for _ in range(3))
    for fidelity, seeds in ((one, [1]), (two, [2]), (both, [1, 2])):
        for seed in seeds:
            fidelity.update(*data(50, seed))
    one.merge(two)
    same(one.result(), both.result())
    assert torch.equal(one.maximum_N, both.maximum_N)


def test_a_perfect_reconstruction() -> None:
    x_BD, _, latents, mean_D = data(10)
    fidelity = Fidelity(NUM_LATENTS)
    fidelity.update(x_BD, x_BD, latents, mean_D)
    result = fidelity.result()
    assert result["fvu"] == 0.0
    assert result["fvu_median"] < 1e-6
    assert result["cosine"] == pytest.approx(1.0, rel=1e-12)
