"""JumpReLU, Gated and ReLU + L1: losses and every gradient against the formulas, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from plmsae_cli.sae.dense import Dense
from plmsae_cli.sae.gated import Gated
from plmsae_cli.sae.interface import Losses
from plmsae_cli.sae.jumprelu import JumpReLU, jump_relu, step
from plmsae_cli.sae.relu_l1 import Error, ReLUL1

D, N, B = 5, 12, 40
P = dict[str, Tensor]


def example(model: Dense, seed: int = 0) -> tuple[Dense, P, Tensor]:
    """The model with random float64 weights, copies of them that autograd follows, and a batch."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * 0.7)
        model.normalize_decoder()
    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    return model, copies, torch.randn(B, D, dtype=torch.float64, generator=generator)


def agree(model: Dense, losses: Losses, total: Tensor, p: P) -> None:
    torch.testing.assert_close(losses.total, total)
    losses.total.backward()  # type: ignore[no-untyped-call]
    total.backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, p[name].grad, msg=lambda text, name=name: f"{name}: {text}")


def loss_of(model: Dense, x_BD: Tensor) -> Losses:
    return model.loss(x_BD, torch.zeros(N, dtype=torch.bool), len(x_BD))


@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("kind", ["squared", "norm"])
def test_relu_l1_is_its_formula(kind: Error, unit_rows: bool) -> None:
    model, p, x_BD = example(ReLUL1(D, N, sparsity_coefficient=0.7, unit_rows=unit_rows, error=kind))
    z_BN = ((x_BD - p["b_dec_D"]) @ p["w_enc_ND"].T + p["b_enc_N"]).relu()
    error_B = ((x_BD - z_BN @ p["w_dec_ND"] - p["b_dec_D"]) ** 2).sum(1)
    if kind == "norm":
        error_B = error_B.sqrt()
    penalty_B = (z_BN * p["w_dec_ND"].norm(dim=1)).sum(1)
    losses = loss_of(model, x_BD)
    agree(model, losses, (error_B + 0.7 * penalty_B).mean() / D, p)
    torch.testing.assert_close(losses.reconstruction, error_B.mean() / D)
    torch.testing.assert_close(losses.aux, penalty_B.mean())
    assert torch.equal(losses.active_B, (z_BN > 0).sum(1))
    assert torch.equal(losses.fired_N, (z_BN > 0).any(0))


def test_the_length_of_the_error_has_one_lambda_at_any_scale() -> None:
    """InterPLM's loss: s times the input, with biases to match, has s times the loss."""
    model, _, x_BD = example(ReLUL1(D, N, error="norm"))
    larger, _, _ = example(ReLUL1(D, N, error="norm"))
    with torch.no_grad():
        larger.b_enc_N.mul_(7.0)
        larger.b_dec_D.mul_(7.0)
    torch.testing.assert_close(loss_of(larger, 7 * x_BD).total, 7 * loss_of(model, x_BD).total)


def test_gated_is_its_formula_with_a_frozen_auxiliary_decoder() -> None:
    model, p, x_BD = example(Gated(D, N, sparsity_coefficient=0.3))
    projected = (x_BD - p["b_dec_D"]) @ p["w_enc_ND"].T
    gate_BN = projected + p["b_enc_N"]
    z_BN = (gate_BN > 0) * (p["r_mag_N"].exp() * projected + p["b_mag_N"]).relu()
    error_B = ((x_BD - z_BN @ p["w_dec_ND"] - p["b_dec_D"]) ** 2).sum(1)
    frozen = {name: p[name].detach().clone() for name in ("w_dec_ND", "b_dec_D")}
    aux_B = ((x_BD - gate_BN.relu() @ frozen["w_dec_ND"] - frozen["b_dec_D"]) ** 2).sum(1)
    losses = loss_of(model, x_BD)
    agree(model, losses, (error_B + 0.3 * gate_BN.relu().sum(1) + aux_B).mean() / D, p)
    assert torch.equal(model.encode_dense(x_BD), z_BN)


def jump_gradients(
    model: JumpReLU, p: P, x_BD: Tensor, per_active: Callable[[Tensor], Tensor | float]
) -> tuple[Tensor, P]:
    """Summed loss and gradients of JumpReLU with an L0 penalty, by hand: no autograd at all.

    `per_active(L0)`: derivative of the summed penalty by the number of active pairs.
    """
    w_enc, b_enc, w_dec, b_dec = (p[n].detach() for n in ("w_enc_ND", "b_enc_N", "w_dec_ND", "b_dec_D"))
    theta = p["log_theta_N"].detach().exp()
    a = (x_BD - b_dec) @ w_enc.T + b_enc
    active = (a > theta).double()
    z = a * active
    error = z @ w_dec + b_dec - x_BD
    d_z = 2 * error @ w_dec.T
    window = ((a - theta).abs() / model.bandwidth < 0.5).double()
    d_theta = (-d_z * theta / model.bandwidth * window).sum(0)
    d_theta = d_theta - per_active(active.sum() / len(x_BD)) * window.sum(0) / model.bandwidth
    d_a = d_z * active
    gradients = {
        "w_enc_ND": d_a.T @ (x_BD - b_dec),
        "b_enc_N": d_a.sum(0),
        "w_dec_ND": z.T @ (2 * error),
        "b_dec_D": 2 * error.sum(0) - d_a.sum(0) @ w_enc,
        "log_theta_N": d_theta * theta,
    }
    return (error**2).sum(), {name: g / (len(x_BD) * D) for name, g in gradients.items()}


@pytest.mark.parametrize("target", [None, 3.0])
def test_jumprelu_gradients_are_the_closed_form(target: float | None) -> None:
    model, p, x_BD = example(JumpReLU(D, N, 0.2, target_l0=target, bandwidth=0.9))
    assert isinstance(model, JumpReLU)
    per_active: Callable[[Tensor], Tensor | float] = lambda _: 0.2 * D  # noqa: E731
    if target is not None:
        per_active = lambda l0: 0.2 * D * 2 * (l0 / target - 1) / target  # noqa: E731
    error, want = jump_gradients(model, p, x_BD, per_active)
    losses = loss_of(model, x_BD)
    losses.total.backward()  # type: ignore[no-untyped-call]
    assert float(want["log_theta_N"].abs().min()) < float(want["log_theta_N"].abs().max())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], msg=lambda text, name=name: f"{name}: {text}")
    l0 = losses.active_B.double().mean()
    penalty = l0 if target is None else (l0 / target - 1) ** 2
    torch.testing.assert_close(losses.aux, penalty)
    torch.testing.assert_close(losses.total, error / (B * D) + 0.2 * penalty)


def test_jumprelu_tanh_is_its_formula() -> None:
    model, p, x_BD = example(
        JumpReLU(D, N, 0.4, penalty="tanh", bandwidth=0.8, tanh_scale=1.5, pre_act_coefficient=0.3)
    )
    theta_N = p["log_theta_N"].exp()
    norms_N = p["w_dec_ND"].norm(dim=1)
    a_BN = (x_BD - p["b_dec_D"]) @ p["w_enc_ND"].T + p["b_enc_N"]
    active_BN = (a_BN > theta_N).double()
    # A surrogate with the estimator's gradient: theta enters z linearly within the window.
    window_BN = ((a_BN - theta_N).abs() < 0.4).double().detach()
    z_BN = a_BN * active_BN - window_BN * (theta_N.detach() / 0.8) * (theta_N - theta_N.detach())
    error = ((x_BD - z_BN @ p["w_dec_ND"] - p["b_dec_D"]) ** 2).sum()
    penalty = torch.tanh(1.5 * z_BN * norms_N).sum()
    silent = ((theta_N - a_BN).relu() * norms_N).sum()
    agree(model, loss_of(model, x_BD), (error + 0.4 * penalty + 0.3 * silent) / (B * D), p)


@settings(deadline=None, max_examples=30)
@given(st.floats(-3, 3), st.floats(0.05, 2), st.floats(0.1, 3))
def test_jump_and_step_of_one_number(a: float, theta: float, bandwidth: float) -> None:
    inputs = [torch.tensor([[a]], dtype=torch.float64), torch.tensor([theta], dtype=torch.float64)]
    for tensor in inputs:
        tensor.requires_grad_()
    window = float(abs(a - theta) < bandwidth / 2)
    jumped = jump_relu(inputs[0], inputs[1], bandwidth)
    assert jumped.item() == (a if a > theta else 0.0)
    d_a, d_theta = torch.autograd.grad(jumped.sum(), inputs)
    assert d_a.item() == float(a > theta)
    assert d_theta.item() == pytest.approx(-theta / bandwidth * window)
    stepped = step(inputs[0], inputs[1], bandwidth)
    assert stepped.item() == float(a > theta)
    none, d_theta = torch.autograd.grad(stepped.sum(), inputs, allow_unused=True)
    assert none is None
    assert d_theta.item() == pytest.approx(-1 / bandwidth * window)


def test_defaults_are_the_papers_at_our_scale() -> None:
    paper, anthropic = JumpReLU(400, 10), JumpReLU(400, 10, penalty="tanh")
    assert (paper.bandwidth, paper.theta_start) == pytest.approx((1e-3 * 20, 1e-3 * 20))
    assert (anthropic.bandwidth, anthropic.theta_start, anthropic.sparsity_warmup) == (2.0, 0.1, 1.0)
    assert anthropic.log_theta_N[0].exp().item() == pytest.approx(0.1)
    assert (paper.unit_rows, anthropic.unit_rows) == (True, False)


def test_scaling_inputs_as_the_paper_does_gives_its_loss() -> None:
    """With x of mean square norm 1 and lambda, and with sqrt(d) x here: the same problem, d times the loss / d."""
    model, _, x_BD = example(JumpReLU(D, N, 0.01, bandwidth=0.3 * math.sqrt(D)))
    assert isinstance(model, JumpReLU)
    x_BD = x_BD / x_BD.square().sum(1).mean().sqrt()
    small = JumpReLU(D, N, 0.01, bandwidth=0.3).double()
    small.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name in ("b_enc_N", "b_dec_D"):
            getattr(small, name).div_(math.sqrt(D))
        small.log_theta_N.sub_(math.log(math.sqrt(D)))
    ours = loss_of(model, x_BD * math.sqrt(D))
    z_BN = small.encode_dense(x_BD)
    papers = (z_BN @ small.w_dec_ND + small.b_dec_D - x_BD).square().sum(1).mean() + 0.01 * (z_BN > 0).sum(
        1
    ).double().mean()
    torch.testing.assert_close(ours.total, papers)


@pytest.mark.parametrize("make", [ReLUL1, Gated, JumpReLU, lambda *a: JumpReLU(*a, penalty="tanh")])
def test_shares_of_ranks_add_up(make: Callable[..., Dense]) -> None:
    model, _, x_BD = example(make(D, N))
    dead_N = torch.zeros(N, dtype=torch.bool)
    whole = model.loss(x_BD, dead_N, B)
    parts = [model.loss(x, dead_N, B) for x in x_BD.split(10)]
    for name in ("total", "reconstruction", "aux"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))
    assert torch.equal(torch.cat([part.active_B for part in parts]), whole.active_B)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (ReLUL1(D, N, 2.0, 0.5), [0.2, 1.0, 2.0, 2.0]),
        (ReLUL1(D, N, 2.0, 0.0), [2.0] * 4),
        (JumpReLU(D, N, 2.0, penalty="tanh"), [0.1, 0.5, 1.0, 2.0]),
    ],
)
def test_the_penalty_rises_over_its_share_of_the_run(model: Dense, expected: list[float]) -> None:
    found: list[Any] = []
    for step_ in (0, 4, 9, 19):
        model.schedule(step_, 20)
        found.append(float(model.sparsity))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("model", [ReLUL1(D, N), Gated(D, N), JumpReLU(D, N), JumpReLU(D, N, penalty="tanh")])
def test_flops_are_those_of_the_products(model: Dense) -> None:
    """As torch counts them: products of a matrix and a vector, which it passes over, do not grow with the batch."""
    model, _, x_BD = example(model)
    model.float()
    with FlopCounterMode(display=False) as counter:
        model.loss(x_BD.float(), torch.zeros(N, dtype=torch.bool), B).total.backward()  # type: ignore[no-untyped-call]
    assert counter.get_total_flops() == B * model.flops_per_token()
