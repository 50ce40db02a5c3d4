"""What only a GPU can show: updates that never wait for it, and the same updates as on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from plmsae_cli.config.training import Train
from plmsae_cli.training.optimizers import Group, Optimizer, build_optimizer
from plmsae_cli.training.rounding import stochastic_bfloat16

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"moments": "bfloat16"}, {"optimizer": "muon"}, {"optimizer": "signum"}], ids=str
)


def made(options: dict[str, str], device: str) -> tuple[Optimizer, dict[str, Parameter]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (96, 64), "b": (96,)}
    named = {name: Parameter(torch.randn(shape, generator=generator).to(device)) for name, shape in shapes.items()}
    return build_optimizer(Train.model_validate(options), [Group("all", named, weight_decay=0.1)]), named


def feed(named: dict[str, Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)


@OPTIONS
def test_an_update_never_waits_for_the_gpu(options: dict[str, str]) -> None:
    optimizer, named = made(options, "cuda")
    feed(named, 0)
    optimizer.step(1e-3, 1.0)  # libraries load and choose algorithms
    feed(named, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(1e-3, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@OPTIONS
def test_updates_are_those_of_a_cpu(options: dict[str, str]) -> None:
    """The way covered, to three per cent: Muon's Newton-Schulz is in bfloat16 on a GPU."""
    ours, on_cpu = made(options, "cuda"), made(options, "cpu")
    before = {name: parameter.detach().clone() for name, parameter in on_cpu[1].items()}
    for step in range(5):
        for optimizer, named in (ours, on_cpu):
            feed(named, step)
            optimizer.step(1e-3, 1.0)
    for name, parameter in on_cpu[1].items():
        way, want = ours[1][name].detach().cpu() - before[name], parameter.detach() - before[name]
        assert float((way - want).norm() / want.norm()) < 0.03


def test_rounding_is_that_of_a_cpu_bit_for_bit() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    index, step = torch.arange(100_000, dtype=torch.int32), torch.tensor(7, dtype=torch.int32)
    want = stochastic_bfloat16(x, index, step, 3)
    assert torch.equal(stochastic_bfloat16(x.cuda(), index.cuda(), step.cuda(), 3).cpu(), want)
