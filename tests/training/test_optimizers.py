from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from plmsae_cli.training.optimizers import Adam, Group

BETAS, EPS = (0.9, 0.999), 6.25e-10


def parameters(seed: int = 0) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Parameter(torch.randn(shape, generator=generator)) for name, shape in {"w": (5, 3), "b": (3,)}.items()
    }


def feed(named: dict[str, Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in named.values():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def test_closed_form_of_the_first_step() -> None:
    """Bias correction makes the first step rate * g / (|g| + eps)."""
    named = {"w": Parameter(torch.tensor([1.0, -2.0]))}
    named["w"].grad = torch.tensor([4.0, -0.5])
    norm = Adam([Group("all", named)], BETAS, EPS).step(0.1)
    torch.testing.assert_close(named["w"].detach(), torch.tensor([0.9, -1.9]))
    assert norm.item() == pytest.approx((4**2 + 0.5**2) ** 0.5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_norm", [None, 1e9, 0.5])
def test_equals_torch_in_float64(weight_decay: float, max_norm: float | None) -> None:
    ours, theirs = parameters(), {name: Parameter(p.detach().double()) for name, p in parameters().items()}
    adam = Adam([Group("all", ours, weight_decay)], BETAS, EPS)
    peer = torch.optim.AdamW(theirs.values(), lr=1.0, betas=BETAS, eps=EPS, weight_decay=weight_decay, foreach=False)
    for step in range(20):
        rate = 0.01 * (step + 1)
        feed(ours, step, scale=step + 1.0)
        for name, parameter in theirs.items():
            gradient = ours[name].grad
            assert gradient is not None
            parameter.grad = gradient.double()
        norm = adam.step(rate, max_norm)
        want = torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm or 1e30)
        assert norm.item() == pytest.approx(want.item(), rel=1e-6)
        peer.param_groups[0]["lr"] = rate
        peer.step()
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name].detach(), parameter.detach().float(), rtol=1e-5, atol=1e-5)


def test_groups_have_their_own_options() -> None:
    fast, slow = parameters(1), parameters(1)
    adam = Adam([Group("fast", fast), Group("slow", slow, lr_scale=0.5, weight_decay=0.2)], BETAS, EPS)
    before = {name: p.detach().clone() for name, p in fast.items()}
    feed(fast, 0)
    feed(slow, 0)
    adam.step(0.1)
    for name, was in before.items():
        moved_fast, moved_slow = fast[name] - was, slow[name] - was * (1 - 0.05 * 0.2)
        torch.testing.assert_close(moved_slow, moved_fast / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_step_that_is_not_finite_changes_nothing(bad: float, max_norm: float | None) -> None:
    named = parameters()
    adam = Adam([Group("all", named)], BETAS, EPS)
    feed(named, 0)
    adam.step(0.1, max_norm)
    everything = [*named.values(), *adam.state_tensors().values()]
    before = [tensor.detach().clone() for tensor in everything]
    feed(named, 1)
    gradient = named["b"].grad
    assert gradient is not None
    gradient[1] = bad
    assert not adam.step(0.1, max_norm).isfinite()
    assert all(torch.equal(tensor, was) for tensor, was in zip(everything, before, strict=True))


def test_saved_state_continues_bit_for_bit() -> None:
    straight, resumed = parameters(), parameters()
    adam = Adam([Group("all", straight)], BETAS, EPS)
    for step in range(6):
        if step == 3:
            weights = {name: p.detach().clone() for name, p in straight.items()}
            state = {name: tensor.clone() for name, tensor in adam.state_tensors().items()}
        feed(straight, step)
        adam.step(0.1, 1.0)
    assert set(state) == {f"all.{name}.{key}" for name in ("w", "b") for key in ("step", "exp_avg", "exp_avg_sq")}
    again = Adam([Group("all", resumed)], BETAS, EPS)
    for name, parameter in resumed.items():
        parameter.data.copy_(weights[name])
    again.load_state_tensors(state)
    for step in range(3, 6):
        feed(resumed, step)
        again.step(0.1, 1.0)
    for name, parameter in straight.items():
        assert torch.equal(parameter, resumed[name])


def test_state_exists_before_the_first_step() -> None:
    state = Adam([Group("all", parameters())], BETAS, EPS).state_tensors()
    assert len(state) == 6
    assert not any(bool(tensor.any()) for tensor in state.values())


def test_state_of_other_parameters_is_named() -> None:
    adam = Adam([Group("all", parameters())], BETAS, EPS)
    state = {name: tensor.clone() for name, tensor in adam.state_tensors().items()}
    state["all.w.exp_avg"] = torch.zeros(2, 2)
    del state["all.b.step"]
    with pytest.raises(ValueError, match=r"all\.b\.step, all\.w\.exp_avg"):
        adam.load_state_tensors(state)
