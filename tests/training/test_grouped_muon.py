"""Muon by shape: its update written out, momentum's warm-up, ranks, skipped steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter

from plmsae_cli.runtime.dist import Gang
from plmsae_cli.training.optimizers import Adam, Group, GroupedMuon
from plmsae_cli.training.optimizers.grouped_muon import orthogonalised
from plmsae_cli.training.optimizers.muon import orthogonalise

SHAPES = {"a": (6, 4), "b": (6, 4), "qkv": (3, 4, 4), "wide": (3, 9), "vector": (5,)}


def parameters(seed: int) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def muon(held: dict[str, Parameter], decay: float = 0.0, warmup: int = 0, gang: Gang | None = None) -> GroupedMuon:
    matrices = {n: p for n, p in held.items() if p.ndim > 1}
    rest = {n: p for n, p in held.items() if p.ndim == 1}
    groups = [Group("hidden", matrices, decay, 0.05), Group("scalar", rest, lr_scale=0.01, linear_maps=False)]
    return GroupedMuon(groups, 0.95, warmup, (0.8, 0.95), 1e-8, gang)


def give(held: dict[str, Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in held.values():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def test_a_stack_is_orthogonalised_matrix_by_matrix() -> None:
    for shape in ((5, 6, 4), (5, 4, 6), (2, 7, 7)):
        stack = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for one, together in zip(stack, orthogonalised(stack), strict=True):
            torch.testing.assert_close(together, orthogonalise(one), rtol=1e-4, atol=1e-5)
            values = torch.linalg.svdvals(together)
            assert values.min() > 0.6
            assert values.max() < 1.3


def test_three_steps_are_the_formula() -> None:
    held, warmup, decay = parameters(0), 4, 0.1
    expected = {n: p.detach().clone() for n, p in held.items()}
    momenta = {n: torch.zeros_like(p) for n, p in expected.items()}
    one = muon(held, decay, warmup)
    vector = Parameter(expected["vector"].clone())
    adam = Adam([Group("scalar", {"vector": vector}, lr_scale=0.01)], (0.8, 0.95), 1e-8)
    for step in range(3):
        give(held, 10 + step)
        mu = 0.85 + 0.1 * step / warmup
        one.steps_done = step
        assert one.momentum() == pytest.approx(mu)
        for name in ("a", "b", "qkv", "wide"):
            g = held[name].grad
            assert g is not None
            momenta[name] = mu * momenta[name] + (1 - mu) * g
            nesterov = (1 - mu) * g + mu * momenta[name]
            matrices = nesterov if nesterov.ndim == 3 else nesterov[None]
            u = torch.stack([orthogonalise(m) for m in matrices]).view(nesterov.shape)
            rows, columns = nesterov.shape[-2:]
            rate = 0.5 * 0.05
            expected[name] = (1 - rate * decay) * expected[name] - rate * math.sqrt(max(1, rows / columns)) * u
        vector.grad = held["vector"].grad.clone()  # type: ignore[union-attr]
        adam.step(0.5)
        one.step(0.5)
    for name in ("a", "b", "qkv", "wide"):
        torch.testing.assert_close(held[name].detach(), expected[name], rtol=1e-4, atol=1e-5)
    assert torch.equal(held["vector"], vector)
    one.steps_done = 50
    assert one.momentum() == 0.95


def test_state_by_name_continues_bit_for_bit() -> None:
    held, others = parameters(0), parameters(0)
    one, other = muon(held), muon(others)
    assert {n for n in one.state_tensors() if n.endswith("momentum")} == {
        f"hidden.{name}.momentum" for name in SHAPES if name != "vector"
    }
    for step in range(2):
        give(held, step)
        one.step(1.0)
    for name, parameter in others.items():
        parameter.data.copy_(held[name].data)
    other.load_state_tensors({n: t.clone() for n, t in one.state_tensors().items()})
    for step in range(2, 4):
        give(held, step)
        give(others, step)
        one.step(1.0)
        other.step(1.0)
    assert all(torch.equal(held[name], others[name]) for name in held)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    held = parameters(0)
    one = muon(held, decay=0.1)
    give(held, 1)
    one.step(1.0, 1.0)
    before = {n: t.clone() for n, t in {**held, **one.state_tensors()}.items()}
    give(held, 2)
    held["qkv"].grad[0, 0, 0] = bad  # type: ignore[index]
    one.step(1.0, 1.0)
    assert all(torch.equal(t, before[n]) for n, t in {**held, **one.state_tensors()}.items())


def test_clipping_is_a_smaller_gradient() -> None:
    held, others = parameters(0), parameters(0)
    one, other = muon(held), muon(others)
    for step in range(2):
        give(held, step)
        give(others, step)
        norm = torch.nn.utils.get_total_norm([p.grad for p in others.values() if p.grad is not None])
        for parameter in others.values():
            assert parameter.grad is not None
            parameter.grad /= norm / 0.3
        found = one.step(1.0, 0.3)
        other.step(1.0)
        assert float(found) == pytest.approx(float(norm))
    for name in held:
        torch.testing.assert_close(held[name], others[name], rtol=1e-5, atol=1e-6)


def test_ranks_orthogonalise_shares_that_need_not_divide() -> None:
    stack = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(2))
    whole = orthogonalised(stack)
    for world in (2, 3, 8):
        shares: list[torch.Tensor] = []

        class Sending(Gang):
            def gather_rows_later(self, own: torch.Tensor, full: torch.Tensor) -> Sending:
                shares.append(own.clone())  # noqa: B023
                return self

            def wait(self) -> None: ...

        for rank in range(world):
            muon(parameters(0), gang=Sending(rank, world))._orthogonal(stack)
        assert len({share.shape for share in shares}) == 1
        torch.testing.assert_close(torch.cat(shares)[:7], whole)
