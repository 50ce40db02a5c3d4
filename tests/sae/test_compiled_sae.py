"""The step of architectures that a GPU compiles, on a CPU: traced and differentiated by torch's compiler, as eagerly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from plmsae_cli.runtime.dist import Gang
from plmsae_cli.sae.architectures import ARCHITECTURES
from plmsae_cli.sae.dead import DeadLatents
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.gated import Gated
from plmsae_cli.sae.initialise import initialise
from plmsae_cli.sae.jumprelu import JumpReLU, jump_relu, step
from plmsae_cli.sae.relu_l1 import ReLUL1
from plmsae_cli.training.optimizers import Adam, Group
from plmsae_cli.training.plain_step import PlainStep, StepParts
from tests.compiled import ERROR, assert_as_eager

D, N, ROWS, STEPS = 16, 64, 256, 3
KINDS: dict[str, Callable[[], Dictionary]] = {
    "jumprelu": lambda: JumpReLU(D, N, bandwidth=0.5),
    "jumprelu_target": lambda: JumpReLU(D, N, bandwidth=0.5, target_l0=8),
    "jumprelu_tanh": lambda: JumpReLU(D, N, penalty="tanh"),
    "gated": lambda: Gated(D, N),
    "relu_l1": lambda: ReLUL1(D, N),
    "relu_l1_norm": lambda: ReLUL1(D, N, error="norm"),
    "relu_l1_unit": lambda: ReLUL1(D, N, unit_rows=True),
}


def plain(kind: str, device: str, compute: torch.dtype) -> PlainStep:
    """A step of a dictionary whose parameters all have a gradient."""
    model = KINDS[kind]()
    initialise(model, 0, rows(0))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)
    model.to(device)
    optimizer = Adam([Group("sae", dict(model.named_parameters()))], (0.9, 0.999), 1e-8)
    dead = DeadLatents(N, torch.device(device))
    return PlainStep(model, StepParts(optimizer, dead, 10_000, 1.0, lambda x: x.float(), compute, 10, Gang()))


def rows(number: int) -> Tensor:
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(number))


def with_compiler(one: PlainStep) -> PlainStep:
    """As the step does on a GPU."""
    one._forward, one._project, one._normalize = (
        torch.compile(part, dynamic=False) for part in (one._forward, one._project, one._normalize)
    )
    return one


def check(kind: str, device: str, compute: torch.dtype, error: float) -> None:
    one = plain(kind, device, compute)
    one._model.schedule(0, 10)
    eagerly, compiled = one._eager_forward, with_compiler(one)._forward
    x_BD, dead_N = rows(0).to(device), torch.zeros(N, dtype=torch.bool, device=device)
    parameters = dict(one._model.named_parameters())
    assert_as_eager(
        lambda: compiled(x_BD, dead_N).losses.total,
        lambda: eagerly(x_BD, dead_N).losses.total,
        parameters,
        error,
    )


def test_every_architecture_that_is_compiled_is_here() -> None:
    assert {type(make()) for make in KINDS.values()} == {a for a in ARCHITECTURES.values() if a.compiles}


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("compute", ERROR)
@pytest.mark.parametrize("kind", KINDS)
def test_a_dictionary_compiled_has_eagers_gradients(kind: str, compute: torch.dtype) -> None:
    check(kind, "cpu", compute, ERROR[compute])


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("kind", KINDS)
def test_steps_compiled_are_eagers(kind: str) -> None:
    """Rows of the decoder, their gradients and norms included."""
    eager, compiled = plain(kind, "cpu", torch.float32), with_compiler(plain(kind, "cpu", torch.float32))
    for number in range(STEPS):
        expected, found = (one(rows(number), number, 1e-3) for one in (eager, compiled))
        torch.testing.assert_close(dict(found), dict(expected))
    for name, parameter in compiled._model.named_parameters():
        torch.testing.assert_close(parameter, eager._model.get_parameter(name), msg=name)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("compute", ERROR)
@pytest.mark.parametrize("function", [jump_relu, step])
def test_thresholds_compiled_pass_gradients_on(function: Callable[..., Tensor], compute: torch.dtype) -> None:
    weights = {"pre_BN": torch.nn.Parameter(torch.randn(64, N)), "theta_N": torch.nn.Parameter(torch.rand(N))}
    mixed_N = torch.rand(N)

    def run() -> Tensor:
        scores_BN = weights["pre_BN"].to(compute)
        found = function(scores_BN, weights["theta_N"], 0.5).float() * mixed_N
        return found.sum() + (scores_BN.float() * mixed_N).sum()

    assert_as_eager(torch.compile(run, dynamic=False), run, weights, ERROR[compute])
