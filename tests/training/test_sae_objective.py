"""A step of the SAE's objective: the unit of the gradient's norm and of its clip."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from plmsae_cli.config.sae import SAE
from plmsae_cli.config.training import Train
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.training.sae_kernels import why_no_kernels
from plmsae_cli.training.sae_objective import SAEObjective, build
from plmsae_cli.training.schedules import topk_learning_rate
from plmsae_cli.training.stream import BlockStream
from tests.training.conftest import RandomRows

D, BATCH, STEPS = 8, 64, 100


def objective(**train: Any) -> SAEObjective:
    options = Train(sae=SAE(num_latents=24, k=4), batch_tokens=BATCH, **train)
    stream = cast(BlockStream, RandomRows(BATCH, D))
    made = SAEObjective(options, stream, torch.zeros(D), 1.0, STEPS, Gang(), torch.device("cpu"), torch.float32)
    made.start(torch.randn(500, D, generator=torch.Generator().manual_seed(0)))
    return made


def test_the_norm_is_of_the_gradient_of_the_squared_error_summed_over_dimensions() -> None:
    one = objective()
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    shown = one.step(0)["grad_norm"]
    with torch.no_grad():
        for name, parameter in one.model.named_parameters():
            parameter.copy_(before[name])
    one.model.zero_grad()
    x_BD = RandomRows(BATCH, D).rows(0)
    ((one.model(x_BD) - x_BD).square().sum() / BATCH).backward()  # type: ignore[no-untyped-call]
    one.model.project_gradients()
    want = torch.nn.utils.get_total_norm([p.grad for p in one.model.parameters() if p.grad is not None])
    assert float(shown) == pytest.approx(float(want), rel=1e-4)


def test_a_clip_at_the_norm_changes_nothing_and_one_below_does() -> None:
    norm = float(objective(grad_clip=None).step(0)["grad_norm"])

    def moment(grad_clip: float | None) -> torch.Tensor:
        one = objective(grad_clip=grad_clip)
        one.step(0)
        (found,) = (t for name, t in one.tensors().items() if name.endswith("sae.w_enc_ND.exp_avg"))
        return found

    free = moment(None)
    torch.testing.assert_close(moment(1.01 * norm), free, rtol=0, atol=0)
    torch.testing.assert_close(moment(0.5 * norm), 0.5 * free)


def test_the_automatic_rate_of_a_short_run_turns_rows_by_two_hundredths_a_step() -> None:
    def peak(**train: Any) -> float:
        one = objective(**train)
        return max(one.rates(step)["lr"] for step in range(STEPS))

    assert peak() == pytest.approx(0.02 / D**0.5)
    assert peak(lr=1e-3) == 1e-3
    assert peak(optimizer="signum") == topk_learning_rate(24)


def test_the_rate_warms_up_over_a_twentieth_of_the_run_or_as_asked() -> None:
    for wanted, steps in (("auto", 5), (9, 9), (0, 0)):
        one = objective(lr=1e-3, lr_warmup_steps=wanted)
        assert one.rates(0)["lr"] == pytest.approx(1e-3 / (steps + 1))
        assert one.rates(steps)["lr"] == 1e-3


@pytest.mark.parametrize(
    ("d", "options", "reason"),
    [
        (64, {"sae": {"k": 4}}, None),
        (64, {"sae": {"k": 4, "k_start": 8}}, "k_start"),
        (64, {"sae": {"k": 4, "architecture": "batch_topk", "selection": "local"}}, "selection: local"),
        (64, {"sae": {"k": 4, "architecture": "multi_topk"}}, "multi_topk has none"),
        (64, {"sae": {"k": 4}, "optimizer": "muon"}, "it updates by adam"),
        (128, {"sae": {"k": 513}}, "above 512"),
        (72, {"sae": {"k": 4}}, "not a multiple of 16"),
    ],
)
def test_what_no_fused_step_trains(d: int, options: dict[str, Any], reason: str | None) -> None:
    """It would train something else, or nothing."""
    train = Train.model_validate(options)
    found = why_no_kernels(build(train, d), train, 1)
    assert found is None if reason is None else found is not None and reason in found


def test_flops_are_those_of_the_products() -> None:
    """As torch counts the encoder's product of a batch, and k of N rows for each of the four others."""
    from torch.utils.flop_counter import FlopCounterMode

    one = objective()
    x_BD = RandomRows(BATCH, D).rows(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.nn.functional.linear(x_BD, one.model.w_enc_ND)
    assert one.flops_per_step() == counter.get_total_flops() * (1 + 4 * 4 / 24)
