"""The look at what is compiled: it sees dropped gradients, has no false alarms and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from plmsae_cli.config.errors import UserError
from plmsae_cli.plm import unet
from plmsae_cli.training import compiled_gradients
from plmsae_cli.training.compiled_gradients import demand_same_gradients, few_documents
from plmsae_cli.training.plm_model import Passes, compiled_passes
from plmsae_cli.training.plm_objective import PLMObjective
from tests.compiled import gradients
from tests.sae.test_compiled_sae import KINDS, plain, rows, with_compiler
from tests.training.compiled_models import MODELS, drawn, first_pack, objective

DTYPES = [torch.float32, torch.bfloat16]


class _Dropped(torch.autograd.Function):
    """x, without its gradient: what torch 2.11's compiler made of some operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0])


def dropped(x: Tensor) -> Tensor:
    found: Tensor = _Dropped.apply(x)  # type: ignore[no-untyped-call]
    return found


def compiles(one: PLMObjective, passes: Passes) -> PLMObjective:
    """As on a GPU, with this for the compiler's work."""
    one._compiles, one._passes = True, passes
    return one


def faulty(one: PLMObjective, monkeypatch: pytest.MonkeyPatch) -> Passes:
    """Its passes, in which no gradient gets below a learned factor."""
    scaled = unet.scaled

    def trunk(*pack: Any) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(unet, "scaled", lambda x, weight: dropped(scaled(x, weight)))
            return one._trained.trunk(*pack)

    return Passes(trunk, one._trained.predict)


def test_dropped_gradients_end_a_start_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    one = objective("cpu", torch.float32, **MODELS["all"])
    before = {name: parameter.clone() for name, parameter in one.model.named_parameters()}
    compiles(one, faulty(one, monkeypatch))
    with pytest.raises(
        UserError, match=r"torch .* the gradients of \d+ of \d+ parameters \(.*\d+ of them zero"
    ) as caught:
        one.step(0)
    assert "train.compile: false" in str(caught.value)
    assert all(torch.equal(before[name], parameter) for name, parameter in one.model.named_parameters())


def test_gradients_that_are_merely_wrong_are_named() -> None:
    weights = {name: torch.nn.Parameter(torch.ones(64)) for name in ("right", "wrong", "frozen")}
    weights["frozen"].requires_grad_(False)

    def loss(share: float) -> Callable[[], Tensor]:
        return lambda: (weights["right"] * weights["wrong"] * (1 + share * weights["wrong"].detach())).sum()

    def halfway() -> Tensor:
        wrong = weights["wrong"]
        return (weights["right"] * (0.3 * wrong + 0.7 * wrong.detach())).sum()

    with pytest.raises(UserError, match=r"of 1 of 2 parameters \(wrong\) are wrong \(0 of them zero\)"):
        demand_same_gradients(weights, halfway, loss(0))
    demand_same_gradients(weights, loss(0.1), loss(0))
    assert all(torch.equal(parameter, torch.ones(64)) for parameter in weights.values())


def test_gradients_that_are_zero_or_rounding_by_right_are_no_alarm() -> None:
    weights = {name: torch.nn.Parameter(torch.ones(8)) for name in ("used", "unused", "cancelled")}

    def loss(order: int) -> Tensor:
        cancelled = (weights["cancelled"].roll(order) * 1e4).softmax(0).sum()  # 1, whatever the weights
        return weights["used"].sum() * cancelled

    demand_same_gradients(weights, lambda: loss(0).detach() + weights["used"].sum(), lambda: loss(1))


def test_without_memory_for_the_plain_pass_training_goes_on() -> None:
    weight = torch.nn.Parameter(torch.ones(3))

    def none_left() -> Tensor:
        raise torch.OutOfMemoryError

    demand_same_gradients({"weight": weight}, lambda: (weight * 0).sum(), none_left)
    assert torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize("kind", ["esm2", "all", "diffusion"])
def test_few_documents_alone_have_the_gradients_of_a_pack_that_weighs_them_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_gradients, "FEW", 60)
    one = drawn(objective("cpu", torch.float64, **MODELS[kind]))
    pack, near = first_pack(one)
    few, whole = few_documents(pack)
    assert 60 <= len(few.inputs_T) < len(pack.inputs_T) == len(whole.inputs_T)
    parameters = dict(one.model.named_parameters())
    alone, among = (
        gradients(one._trained.score(each, near, one._trained.passes)[0], parameters) for each in (few, whole)
    )
    for name, gradient in alone.items():
        torch.testing.assert_close(gradient, among[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("kind", "compute"), [("all", torch.bfloat16), ("esm2", torch.float32)])
def test_the_look_changes_no_bit_of_a_training(
    kind: str, compute: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_gradients, "FEW", 60)

    def trained() -> tuple[list[float], dict[str, Tensor]]:
        one = objective("cpu", compute, **MODELS[kind])
        compiles(one, compiled_passes(one._trained))
        state = torch.get_rng_state()
        losses = [float(one.step(step)["loss"]) for step in range(3)]
        assert torch.equal(torch.get_rng_state(), state)
        return losses, {name: parameter.detach() for name, parameter in one.model.named_parameters()}

    losses, weights = trained()
    monkeypatch.setattr(PLMObjective, "_check", lambda *_: None)
    expected_losses, expected = trained()
    assert losses == expected_losses
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("compute", DTYPES)
@pytest.mark.parametrize("kind", MODELS)
def test_passes_that_round_otherwise_are_no_alarm_at_any_time(
    kind: str, compute: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, where most gradients are zero, and later; the other arithmetic is float32, further off than a compiler."""
    monkeypatch.setattr(compiled_gradients, "FEW", 60)
    one = objective("cpu", compute, **MODELS[kind])
    other = objective("cpu", torch.float32, **MODELS[kind])
    other._trained.model = one.model
    one._compiles = True

    def score(pack: Any, near: int | None) -> Any:
        return other._trained.score(pack, near, other._trained.passes)

    for step in range(3):
        one._compiled.clear()
        monkeypatch.setattr(one, "_score", score)
        one._check(*first_pack(one))
        monkeypatch.undo()
        one.step(step)
        with torch.no_grad():
            for parameter in one.model.parameters():
                parameter.mul_(1.5)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("compute", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_dictionary_compiled_is_looked_at_once_and_nothing_changes(kind: str, compute: torch.dtype) -> None:
    one, unseen = (with_compiler(plain(kind, "cpu", compute)) for _ in range(2))
    one._unchecked = True
    for number in range(2):
        found, expected = (each(rows(number), number, 1e-3) for each in (one, unseen))
        assert not one._unchecked
        assert torch.equal(found["loss"], expected["loss"])
    for name, parameter in one._model.named_parameters():
        assert torch.equal(parameter, unseen._model.get_parameter(name)), name


def test_a_dictionary_whose_gradients_are_dropped_ends_at_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    one = plain("jumprelu", "cpu", torch.float32)
    one._unchecked = True
    eager = one._eager_forward

    def compiled(*batch: Tensor) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(one._model, "_decode", lambda z: dropped(z) @ one._model.w_dec_ND + one._model.b_dec_D)
            return eager(*batch)

    one._forward = compiled
    with pytest.raises(UserError, match="w_enc_ND"):
        one(rows(0), 0, 1e-3)


@pytest.mark.parametrize("kind", ["jumprelu", "jumprelu_tanh", "gated", "relu_l1"])
def test_a_penalty_whose_gradients_are_dropped_is_seen_though_it_weighs_little_at_first(kind: str) -> None:
    one = plain(kind, "cpu", torch.float32)
    one._parts = replace(one._parts, total_steps=100_000)
    one._unchecked = True
    eager = one._eager_forward

    def compiled(*batch: Tensor) -> Any:
        found = eager(*batch)
        return found._replace(losses=found.losses._replace(aux=dropped(found.losses.aux)))

    one._forward = compiled
    with pytest.raises(UserError, match="are zero"):
        one(rows(0), 0, 1e-3)


def test_what_is_not_finite_is_no_alarm() -> None:
    weight = torch.nn.Parameter(torch.ones(64))
    demand_same_gradients({"weight": weight}, lambda: (weight * torch.inf).sum(), lambda: weight.sum())
    demand_same_gradients({"weight": weight}, lambda: (2 * weight).sum(), lambda: (weight * torch.inf).sum())


def test_ranks_raise_together() -> None:
    weights = {name: torch.nn.Parameter(torch.ones(64)) for name in ("one", "other")}

    def loss() -> Tensor:
        return weights["one"].sum() + weights["other"].sum()

    def elsewhere(verdicts: Tensor) -> Tensor:
        return torch.maximum(verdicts, torch.tensor([0.0, 1.0]))

    with pytest.raises(UserError, match=r"of 1 of 2 parameters \(other\) are wrong"):
        demand_same_gradients(weights, loss, loss, elsewhere)
