"""The objective with the fused step: what it saves continues it bit for bit, AuxK's places included."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.training import Train
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.training import sae_kernels
from plmsae_cli.training.sae_objective import DEAD_BOUND, SAEObjective, build
from plmsae_cli.training.stream import BlockStream

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
D, N, K, ROWS, STEPS, SAVED = 32, 24, 3, 6, 5, 3


class Rows:
    def __init__(self) -> None:
        self.blocks, self.wait_seconds = SimpleNamespace(d=D, quantiser=None), 0.0

    def rows(self, step: int) -> torch.Tensor:
        return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(step)).to(DEVICE)


def objective(architecture: str = "topk", **train: object) -> SAEObjective:
    # Dead after 3 steps: counted every step, some are by the time the state is saved.
    options = Train.model_validate(
        {
            "sae": {"architecture": architecture, "num_latents": N, "k": K, "k_aux": 4},
            "batch_tokens": ROWS,
            "dead_tokens": 3 * ROWS,
            "lr": 1e-2,
            **train,
        }
    )
    return SAEObjective(
        options, cast(BlockStream, Rows()), torch.zeros(D), 1.0, STEPS, Gang(), DEVICE, torch.bfloat16
    )  # fmt: skip


@pytest.mark.parametrize("architecture", [pytest.param("topk", marks=pytest.mark.slow), "matryoshka_batch_topk"])
def test_what_is_saved_continues_bit_for_bit(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sae_kernels, "why_plain", lambda *_: None)
    whole = objective(architecture)
    whole.start(torch.randn(100, D, generator=torch.Generator().manual_seed(99)))
    with torch.no_grad():
        whole.model.b_enc_N[::3] = -20.0
    whole._renew()
    for step in range(SAVED):
        whole.step(step)
    saved = {name: tensor.clone() for name, tensor in whole.tensors().items()}
    assert DEAD_BOUND in saved
    resumed = objective(architecture)
    resumed.load(saved)
    for step in range(SAVED, STEPS):
        one, two = whole.step(step), resumed.step(step)
        assert all(torch.equal(one[name], two[name]) for name in one), step
    assert float(one["aux"]) > 0
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name


@pytest.mark.parametrize("architecture", ["jumprelu", pytest.param("switch", marks=pytest.mark.slow)])
def test_own_parameters_are_saved_and_continue_bit_for_bit(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sae_kernels, "why_plain", lambda *_: None)
    sae = {"jumprelu": {"target_l0": K, "theta_start": 0.5, "bandwidth": 0.5}, "switch": {"k": K, "num_experts": 4}}
    options = {"sae": {"architecture": architecture, "num_latents": N, **sae[architecture]}, "moments": "bfloat16"}
    whole = objective(**options)
    whole.start(torch.randn(100, D, generator=torch.Generator().manual_seed(99)))
    before = {name: tensor.clone() for name, tensor in whole.tensors().items()}
    whole.step(0)
    saved = {name: tensor.clone() for name, tensor in whole.tensors().items()}
    resumed = objective(**options)
    resumed.load(saved)
    one, two = whole.step(1), resumed.step(1)
    assert all(torch.equal(one[name], two[name]) for name in one)
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name
        assert name.startswith(("model.b_dec", "tokens")) or not torch.equal(tensor, before[name]), f"{name} is trained"


@pytest.mark.parametrize(
    ("sae", "gpus", "reason"),
    [
        ({"architecture": "switch", "k": K}, 1, None),
        ({"architecture": "switch", "k": K}, 2, "on one GPU alone"),
        ({"architecture": "switch", "k": 1, "num_latents": 512, "num_experts": 256}, 1, None),
        ({"architecture": "switch", "k": 1, "num_latents": 512, "num_experts": 512}, 1, "num_experts (512) is above"),
        ({"architecture": "jumprelu"}, 1, None),
        ({"architecture": "jumprelu", "penalty": "tanh"}, 1, "penalty: tanh"),
        ({"architecture": "gated"}, 1, "gated has none"),
        ({"architecture": "topk", "k": K}, 2, None),
    ],
)
def test_who_has_kernels_on_how_many_gpus(sae: dict[str, object], gpus: int, reason: str | None) -> None:
    options = Train.model_validate({"sae": {"num_latents": N, **sae}, "batch_tokens": ROWS})
    found = sae_kernels.why_no_kernels(build(options, D), options, gpus)
    assert found is None if reason is None else found is not None and reason in found


def test_fused_kernels_that_cannot_be_had_are_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="optimizer: signum"):
        objective(optimizer="signum", kernels="fused")
    assert objective(kernels="plain")._fused is None
