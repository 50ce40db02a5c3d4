"""What only a GPU can show: a step that never waits for it, and the same step as on a CPU."""

from __future__ import annotations

import pytest
import torch

from plmsae_cli.sae.dead import DeadLatents
from plmsae_cli.sae.initialise import initialise
from plmsae_cli.sae.matryoshka import MatryoshkaTopK
from plmsae_cli.sae.topk import TopK
from plmsae_cli.training.optimizers import Adam, Group

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


class Run:
    """A few steps on one device, with a third of the latents called dead."""

    def __init__(self, kind: type[TopK], device: str, compute: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.device, self.compute = device, compute
        self.batches = [torch.randn(512, 64, generator=generator).to(device) for _ in range(4)]
        self.model = kind(64, 1024, k=8).to(device)
        initialise(self.model, 0, self.batches[0])
        self.optimizer = Adam([Group("sae", dict(self.model.named_parameters()))], (0.9, 0.999), 6.25e-10)
        self.dead = DeadLatents(1024, device)
        self.dead_N = (torch.arange(1024) % 3 == 0).to(device)

    def step(self, x_BD: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(self.device, self.compute, enabled=self.compute != torch.float32):
            losses = self.model.loss(x_BD, self.dead_N, len(x_BD))
        losses.total.backward()
        self.model.project_gradients()
        self.optimizer.step(1e-3, max_norm=1.0)
        self.model.normalize_decoder()
        self.dead.update(losses.fired_N, len(x_BD))
        return losses.total.detach()

    def losses(self) -> torch.Tensor:
        return torch.stack([self.step(x_BD) for x_BD in self.batches]).cpu()


KINDS = pytest.mark.parametrize("kind", [TopK, MatryoshkaTopK])


@KINDS
def test_a_step_never_waits_for_the_gpu(kind: type[TopK]) -> None:
    run = Run(kind, "cuda")
    run.losses()  # libraries load and choose algorithms
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step(run.batches[0])
        run.dead.mask(1000)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@KINDS
def test_steps_equal_those_on_a_cpu(kind: type[TopK]) -> None:
    torch.testing.assert_close(Run(kind, "cuda").losses(), Run(kind, "cpu").losses(), rtol=1e-4, atol=0)


@KINDS
def test_steps_repeat_bit_for_bit(kind: type[TopK]) -> None:
    one, two = Run(kind, "cuda"), Run(kind, "cuda")
    assert torch.equal(one.losses(), two.losses())
    for name, parameter in one.model.named_parameters():
        assert torch.equal(parameter, two.model.get_parameter(name)), name


@KINDS
def test_bfloat16_is_close(kind: type[TopK]) -> None:
    half, full = Run(kind, "cuda", torch.bfloat16), Run(kind, "cuda")
    torch.testing.assert_close(half.losses(), full.losses(), rtol=0.02, atol=0)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
