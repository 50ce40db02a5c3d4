from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from plmsae_cli.sae.dictionary import Dictionary
    from plmsae_cli.sae.fused.step import FusedStep
    from plmsae_cli.training.optimizers.rounded_adam import RoundedAdam

pytest.importorskip("triton")
if not torch.cuda.is_available():
    _spec = importlib.util.spec_from_file_location("interpreter", Path(__file__).with_name("interpreter.py"))
    assert _spec is not None
    assert _spec.loader is not None
    _interpreter = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_interpreter)
    _interpreter.correct()


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a GPU is given would only take the interpreter's time."""
    if not torch.cuda.is_available():
        from plmsae_cli.sae.fused import gradients, update

        monkeypatch.setattr(update, "PROGRAMS", 8)
        monkeypatch.setattr(gradients, "SPLITS", 4)


Ours = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""A fused step's masters and Adam's state."""


@pytest.fixture
def steps_as_plain() -> Callable[..., None]:
    def check(
        step: FusedStep,
        figures: Mapping[str, Tensor],
        want: Mapping[str, Tensor | None],
        plain: Dictionary,
        optimizer: RoundedAdam,
        ours: Ours,
    ) -> None:
        """Every gradient is `want`'s; clipped and applied to `plain` by the plain path, they give what is now in `ours`."""
        g, (masters, state) = step._gradients, ours
        silent_N1 = (g.touched_N == 0).unsqueeze(1)
        gradients = {
            "w_enc_ND": g.grad_enc_ND.float().masked_fill(silent_N1, 0),
            "w_dec_ND": g.grad_dec_ND.float().masked_fill(silent_N1, 0),
            "b_enc_N": g.grad_b_N,
            "b_dec_D": g.grad_b_SD.sum(0),
            **step._update.own_gradients,
        }
        for name, gradient in gradients.items():
            exact = want[name]
            assert exact is not None
            assert float((gradient.double().cpu() - exact).norm() / exact.norm()) < 0.02, name
            plain.get_parameter(name).grad = gradient.clone()

        plain.project_gradients()
        norm = optimizer.step(1e-2, 0.01)
        plain.normalize_decoder()
        assert float(figures["grad_norm"]) == pytest.approx(plain.d * float(norm), rel=0.02)
        assert float(norm) > 0.01, "clipped"
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(masters[name], parameter.detach(), rtol=1e-3, atol=1e-3, msg=name)
        for name, tensor in optimizer.state_tensors().items():
            torch.testing.assert_close(state[name.removeprefix("sae.")], tensor, rtol=0.02, atol=1e-7, msg=name)

    return check


@pytest.fixture
def infinity_changes_nothing() -> Callable[..., None]:
    def check(step: FusedStep, raw_BD: Tensor, ours: Ours) -> None:
        before = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in ours]
        raw_BD[3, 3] = torch.inf
        assert not step(raw_BD, 1, 1e-2)["loss"].isfinite()
        for tensors, kept in zip(ours, before, strict=True):
            assert all(torch.equal(tensor, kept[name]) for name, tensor in tensors.items()), "nothing changes"

    return check
