from __future__ import annotations

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from plmsae_cli.sae.batch_topk import BatchTopK
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.gated import Gated
from plmsae_cli.sae.initialise import initialise
from plmsae_cli.sae.jumprelu import JumpReLU
from plmsae_cli.sae.relu_l1 import ReLUL1
from plmsae_cli.sae.topk import TopK


def random_model() -> TopK:
    torch.manual_seed(0)
    model = TopK(5, 12, k=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def test_decoder_norms_are_of_latents() -> None:
    model = random_model()
    before_ND = model.w_dec_ND.detach().clone()
    model.normalize_decoder()
    for row_D, was_D in zip(model.w_dec_ND, before_ND, strict=True):
        assert abs(sum(value**2 for value in row_D.tolist()) - 1) < 1e-6
        torch.testing.assert_close(row_D * was_D.norm(), was_D)


def test_projected_gradient_is_orthogonal_and_nothing_else_changes() -> None:
    model = random_model()  # rows of any norm
    gradient_ND = torch.randn(12, 5)
    model.w_dec_ND.grad = gradient_ND.clone()
    model.project_gradients()
    projected_ND = model.w_dec_ND.grad
    rows_ND = model.w_dec_ND.detach()
    torch.testing.assert_close((projected_ND * rows_ND).sum(1), torch.zeros(12), rtol=0, atol=1e-6)
    # What was removed is a multiple of the row: the 2 x 2 minors vanish.
    removed_ND = gradient_ND - projected_ND
    minors = removed_ND.unsqueeze(2) * rows_ND.unsqueeze(1) - removed_ND.unsqueeze(1) * rows_ND.unsqueeze(2)
    torch.testing.assert_close(minors, torch.zeros_like(minors), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [ReLUL1(32, 1024), JumpReLU(32, 1024), JumpReLU(32, 1024, penalty="tanh"), Gated(32, 1024), BatchTopK(32, 1024, 4)],
    ids=lambda model: type(model).__name__,
)
def test_the_memory_foretold_is_what_a_step_holds(model: Dictionary) -> None:
    """Peak of live tensors over forward and backward, beyond weights and gradients."""
    x_BD = torch.randn(1024, 32, generator=torch.Generator().manual_seed(0))
    initialise(model, 0, x_BD)
    dead_N = torch.zeros(1024, dtype=torch.bool)
    tracker = MemTracker()
    tracker.track_external(model, x_BD)
    with tracker:
        model.loss(x_BD, dead_N, len(x_BD)).total.backward()  # type: ignore[no-untyped-call]
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    weights = 2 * sum(parameter.numel() * 4 for parameter in model.parameters())
    assert 0.5 < (peak["Total"] - weights) / model.step_bytes(len(x_BD)) < 1.3
