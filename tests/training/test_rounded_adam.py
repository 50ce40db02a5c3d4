"""Adam with bfloat16 moments: torch's Adam but for the rounding, which is the stated one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from plmsae_cli.training.optimizers import Group, RoundedAdam, rounded_adam
from plmsae_cli.training.rounding import stochastic_bfloat16

BETAS, EPS = (0.9, 0.999), 6.25e-10


def gradient(step: int, count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(step)) + 0.5


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_norm", [None, 3.0])
def test_one_step_from_given_moments_is_torchs_and_the_moments_are_its_rounded(
    weight_decay: float, max_norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step starts a float32 torch Adam from our moments; sizes cross the tiles' borders."""
    monkeypatch.setattr(rounded_adam, "_TILE", 7)
    named = {"a": Parameter(gradient(100, 5)), "w": Parameter(gradient(101, 20).view(4, 5))}
    ours = RoundedAdam([Group("all", named, weight_decay)], BETAS, EPS)
    for step in range(5):
        state = {name: tensor.clone() for name, tensor in ours.state_tensors().items()}
        theirs = {name: Parameter(p.detach().clone()) for name, p in named.items()}
        peer = torch.optim.AdamW(theirs.values(), lr=0.01, betas=BETAS, eps=EPS, weight_decay=weight_decay)
        for name, parameter in theirs.items():
            parameter.grad = gradient(step, parameter.numel()).view_as(parameter)
            named[name].grad = parameter.grad.clone()
            moments = {key: state[f"all.{name}.{key}"].float() for key in ("exp_avg", "exp_avg_sq")}
            peer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
        torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm or 1e30)
        ours.step(0.01, max_norm)
        peer.step()
        for place, (name, parameter) in enumerate(theirs.items()):
            torch.testing.assert_close(named[name].detach(), parameter.detach(), rtol=1e-5, atol=1e-7)
            index = torch.arange(parameter.numel(), dtype=torch.int32)
            for salt, key in enumerate(("exp_avg", "exp_avg_sq")):
                exact = peer.state[parameter][key].flatten()
                count = torch.tensor(step + 1, dtype=torch.int32)
                want = stochastic_bfloat16(exact, index, count, 2 * place + salt).view_as(parameter)
                found = ours.state_tensors()[f"all.{name}.{key}"]
                assert found.dtype is torch.bfloat16
                # Where float32 rounds its sums otherwise, a rare element falls on the other side.
                assert float((found != want).float().mean()) < 0.1
                torch.testing.assert_close(found, want, rtol=2**-7, atol=0)


def test_the_second_moment_reaches_the_true_one() -> None:
    """exp_avg_sq of gradients of variance 4 from 1: rounding to nearest would stay where a step is below half a unit."""
    count, steps = 256, 6000
    named = {"w": Parameter(torch.zeros(count))}
    ours = RoundedAdam([Group("all", named)], BETAS, EPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        named["w"].grad = 2 * torch.randn(count, generator=generator)
        ours.step(0.0)
    found = ours.state_tensors()["all.w.exp_avg_sq"].double()
    bias = 1 - BETAS[1] ** steps
    # A chi-squared variable's own noise, sqrt(2) 4 sqrt((1 - beta) / (1 + beta)), is above the rounding's.
    assert float(found.mean()) / bias == pytest.approx(4.0, rel=5 * 2**0.5 * 0.0224 * 2 / count**0.5)


def test_float64_follows_it_over_many_steps() -> None:
    """Along a quadratic bowl, where Adam's path depends on every moment, the loss ends where float64 ends."""
    ours, theirs = Parameter(gradient(1, 300)), Parameter(gradient(1, 300).double())
    adam = RoundedAdam([Group("all", {"w": ours})], BETAS, EPS)
    peer = torch.optim.Adam([theirs], lr=1e-2, betas=BETAS, eps=EPS)
    for step in range(400):
        noise = gradient(step + 10, 300) - 0.5
        ours.grad, theirs.grad = ours.detach() + noise, theirs.detach() + noise.double()
        adam.step(1e-2)
        peer.step()
    one, two = ours.detach().double().square().mean(), theirs.detach().square().mean()
    assert float(one) == pytest.approx(float(two), rel=0.02)


def test_saved_state_continues_bit_for_bit_and_a_bad_step_changes_nothing() -> None:
    straight, resumed = Parameter(gradient(2, 50)), Parameter(gradient(2, 50))
    one = RoundedAdam([Group("all", {"w": straight})], BETAS, EPS)
    two = RoundedAdam([Group("all", {"w": resumed})], BETAS, EPS)
    for step in range(6):
        if step == 3:
            resumed.data.copy_(straight)
            two.load_state_tensors({name: t.clone() for name, t in one.state_tensors().items()})
            straight.grad = torch.full((50,), float("nan"))
            assert not one.step(0.1, 1.0).isfinite()
        straight.grad = gradient(step, 50)
        one.step(0.1, 1.0)
        if step >= 3:
            resumed.grad = gradient(step, 50)
            two.step(0.1, 1.0)
    assert torch.equal(straight, resumed)
    assert all(torch.equal(t, two.state_tensors()[name]) for name, t in one.state_tensors().items())


def test_some_rows_are_rounded_as_in_the_whole() -> None:
    generator = torch.Generator().manual_seed(5)
    whole = Parameter(torch.randn(6, 4, generator=generator))
    part = Parameter(whole.detach()[2:5].clone())
    one = RoundedAdam([Group("all", {"w": whole})], (0.9, 0.999), 1e-8)
    two = RoundedAdam([Group("all", {"w": part}, first_rows={"w": 2})], (0.9, 0.999), 1e-8)
    for _ in range(3):
        whole.grad = torch.randn(6, 4, generator=generator)
        part.grad = whole.grad[2:5].clone()
        one.step(1e-2)
        two.step(1e-2)
    assert torch.equal(whole[2:5], part)
    for name, tensor in two.state_tensors().items():
        assert torch.equal(tensor, one.state_tensors()[name][2:5] if tensor.ndim else one.state_tensors()[name])
