"""Muon and Signum beside torch's own, the closed form of Newton-Schulz, and what options build."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from plmsae_cli.config.training import Train
from plmsae_cli.training.optimizers import Adam, Group, Muon, Optimizer, RoundedAdam, Signum, build_optimizer
from plmsae_cli.training.optimizers.muon import COEFFICIENTS, ITERATIONS, orthogonalise

BETAS, EPS = (0.9, 0.999), 1e-8
SHAPES = {"wide": (6, 10), "tall": (9, 4), "bias": (5,)}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {n: Parameter(torch.randn(shape, generator=generator).to(dtype)) for n, shape in SHAPES.items()}


def feed(named: dict[str, Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.mark.parametrize("shape", [(7, 7), (5, 12), (40, 6)])
def test_newton_schulz_is_its_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    m = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, s, vt = torch.linalg.svd(m, full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / s.square().sum().sqrt()
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonalise(m), u @ torch.diag(s) @ vt)
    assert float(s.min()) > 0.6
    assert float(s.max()) < 1.3


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_muon_is_torchs_on_matrices_and_adam_on_the_rest(weight_decay: float, max_norm: float | None) -> None:
    ours, theirs = parameters(), parameters()
    muon = Muon([Group("all", ours, weight_decay)], 0.95, BETAS, EPS, arithmetic=torch.bfloat16)
    matrices = [p for p in theirs.values() if p.ndim == 2]
    peer = torch.optim.Muon(matrices, lr=1.0, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW([theirs["bias"]], lr=1.0, betas=BETAS, eps=EPS, weight_decay=weight_decay)
    for step in range(10):
        rate = 0.01 * (step + 1)
        feed(ours, step)
        feed(theirs, step)
        norm = muon.step(rate, max_norm)
        assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm or 1e30)))
        for optimizer in (peer, adam):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
    for name, parameter in theirs.items():
        # bfloat16 differs in the last place where its inputs differ in the last of float32.
        torch.testing.assert_close(ours[name].detach(), parameter.detach(), rtol=1e-2, atol=1e-2)


def test_muon_leaves_embeddings_to_adam() -> None:
    ours, theirs = parameters(), parameters()
    muon = Muon([Group("all", ours, linear_maps=False)], 0.95, BETAS, EPS)
    adam = Adam([Group("all", theirs)], BETAS, EPS)
    for step in range(3):
        for named, optimizer in ((ours, muon), (theirs, adam)):
            feed(named, step)
            optimizer.step(0.1, 1.0)
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


def test_the_update_of_a_square_matrix_has_the_size_of_adams() -> None:
    """Its root mean square is .2 of the rate, to the spread of Newton-Schulz's singular values."""
    w = Parameter(torch.zeros(64, 64))
    w.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    Muon([Group("all", {"w": w})], 0.95, BETAS, EPS).step(1.0)
    assert float(w.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.25)


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_signum_is_the_sign_of_sgds_momentum(max_norm: float | None) -> None:
    """Torch's SGD with as much dampening as momentum moves by the momentum itself: its sign is our step's."""
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    signum = Signum([Group("all", ours, weight_decay=0.1)], 0.9)
    sgd = torch.optim.SGD(theirs.values(), lr=1.0, momentum=0.9, dampening=0.9)
    first = True
    for step in range(10):
        rate = 0.01 * (step + 1)
        feed(ours, step)
        feed(theirs, step)
        signum.step(rate, max_norm)
        torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm or 1e30)
        before = {name: p.detach().clone() for name, p in theirs.items()}
        sgd.step()
        for name, parameter in theirs.items():
            if first:  # torch starts the momentum at the gradient, not at a tenth of it
                sgd.state[parameter]["momentum_buffer"].mul_(0.1)
            moved = before[name] - parameter.detach()
            parameter.data.copy_(before[name] * (1 - 0.1 * rate) - rate * moved.sign())
        first = False
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name].detach(), parameter.detach())


def test_signum_leaves_what_has_no_gradient() -> None:
    w = Parameter(torch.ones(3))
    w.grad = torch.tensor([1.0, 0.0, -2.0])
    Signum([Group("all", {"w": w})], 0.9).step(0.5)
    assert w.tolist() == [0.5, 1.0, 1.5]


def muon(named: dict[str, Parameter]) -> Optimizer:
    return Muon([Group("all", named)], 0.95, BETAS, EPS)


def signum(named: dict[str, Parameter]) -> Optimizer:
    return Signum([Group("all", named)], 0.9)


@pytest.mark.parametrize("make", [muon, signum])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(make: type[Optimizer], bad: float) -> None:
    named = parameters()
    optimizer = make(named)
    feed(named, 0)
    optimizer.step(0.1, 1.0)
    everything = [*named.values(), *optimizer.state_tensors().values()]
    before = [tensor.detach().clone() for tensor in everything]
    feed(named, 1)
    gradient = named["wide"].grad
    assert gradient is not None
    gradient[1, 2] = bad
    assert not optimizer.step(0.1, 1.0).isfinite()
    assert all(torch.equal(tensor, was) for tensor, was in zip(everything, before, strict=True))


@pytest.mark.parametrize(
    ("make", "keys"),
    [(muon, {"wide": ["momentum"], "tall": ["momentum"], "bias": ["step", "exp_avg", "exp_avg_sq"]}),
     (signum, {"wide": ["momentum"], "tall": ["momentum"], "bias": ["momentum"]})],
)  # fmt: skip
def test_saved_state_continues_bit_for_bit(make: type[Optimizer], keys: dict[str, list[str]]) -> None:
    straight, resumed = parameters(), parameters()
    one, two = make(straight), make(resumed)
    assert set(one.state_tensors()) == {f"all.{name}.{key}" for name, each in keys.items() for key in each}
    for step in range(6):
        if step == 3:
            for name, parameter in resumed.items():
                parameter.data.copy_(straight[name])
            two.load_state_tensors({name: t.clone() for name, t in one.state_tensors().items()})
        feed(straight, step)
        one.step(0.1, 1.0)
        if step >= 3:
            feed(resumed, step)
            two.step(0.1, 1.0)
    assert all(torch.equal(straight[name], resumed[name]) for name in SHAPES)
    one.zero_grad()
    assert all(p.grad is None for p in straight.values())


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, Adam),
        ({"moments": "bfloat16"}, RoundedAdam),
        ({"optimizer": "muon"}, Muon),
        ({"optimizer": "signum"}, Signum),
    ],
)
def test_options_choose(options: dict[str, str], kind: type[Optimizer]) -> None:
    assert type(build_optimizer(Train.model_validate(options), [Group("all", parameters())])) is kind


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"momentum": 0.9}, "momentum has no effect with optimizer: adam"),
        ({"moments": "bfloat16", "optimizer": "muon"}, "moments: bfloat16 has no effect with optimizer: muon"),
        ({"betas": [0.8, 0.99], "optimizer": "signum"}, "betas has no effect with optimizer: signum"),
        ({"eps": 1e-8, "optimizer": "signum"}, "eps has no effect with optimizer: signum"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Train.model_validate(options)


@pytest.mark.parametrize(("options", "share"), [({"optimizer": "muon"}, 0.05), ({"optimizer": "signum"}, 0.1)])
def test_the_automatic_momentum(options: dict[str, str], share: float) -> None:
    for given, taken in (({}, share), ({"momentum": 0.75}, 0.25)):
        named = parameters()
        optimizer = build_optimizer(Train.model_validate(options | given), [Group("all", named)])
        feed(named, 0)
        wanted = taken * named["wide"].grad
        optimizer.step(0.1)
        torch.testing.assert_close(optimizer.state_tensors()["all.wide.momentum"], wanted)
