"""What only a GPU can show: a step that never waits for it, and the same step as on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from plmsae_cli.sae.batch_topk import BatchTopK
from plmsae_cli.sae.dead import DeadLatents
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.gated import Gated
from plmsae_cli.sae.initialise import initialise
from plmsae_cli.sae.jumprelu import JumpReLU
from plmsae_cli.sae.matryoshka import MatryoshkaBatchTopK, MatryoshkaTopK
from plmsae_cli.sae.multi_topk import MultiTopK
from plmsae_cli.sae.relu_l1 import ReLUL1
from plmsae_cli.sae.switch import Switch
from plmsae_cli.sae.topk import TopK
from plmsae_cli.training.optimizers import Adam, Group

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


KINDS: dict[str, Callable[[], Dictionary]] = {
    "topk": lambda: TopK(64, 1024, 8),
    "multi_topk": lambda: MultiTopK(64, 1024, 8),
    "matryoshka_topk": lambda: MatryoshkaTopK(64, 1024, 8),
    "batch_topk": lambda: BatchTopK(64, 1024, 8),
    "matryoshka_batch_topk": lambda: MatryoshkaBatchTopK(64, 1024, 8),
    "jumprelu": lambda: JumpReLU(64, 1024, bandwidth=0.5, target_l0=8),
    "jumprelu_tanh": lambda: JumpReLU(64, 1024, penalty="tanh"),
    "gated": lambda: Gated(64, 1024),
    "relu_l1": lambda: ReLUL1(64, 1024),
    "switch": lambda: Switch(64, 1024, 8, 4),
}
EVERY = pytest.mark.parametrize("kind", list(KINDS))


class Run:
    """A few steps on one device, with a third of the latents called dead."""

    def __init__(self, kind: str, device: str, compute: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.device, self.compute = device, compute
        self.batches = [torch.randn(512, 64, generator=generator).to(device) for _ in range(4)]
        self.model = KINDS[kind]().to(device)
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


@EVERY
def test_a_step_never_waits_for_the_gpu(kind: str) -> None:
    run = Run(kind, "cuda")
    run.losses()  # libraries load and choose algorithms
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step(run.batches[0])
        run.dead.mask(1000)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_share_of_a_batch_topk_batch_never_waits_for_the_gpu() -> None:
    """A rank of four is not told how many pairs are its own: they are filled up to twice the mean."""
    run, reference = Run("batch_topk", "cuda"), Run("batch_topk", "cpu")
    figures = []
    for each in (run, reference):
        model, x_BD = each.model, each.batches[0]
        model.loss(x_BD, each.dead_N, 4 * len(x_BD), lambda tensor: 4 * tensor)
        with torch.cuda.device(0):
            torch.cuda.set_sync_debug_mode("error" if each is run else "default")
            losses = model.loss(x_BD, each.dead_N, 4 * len(x_BD), lambda tensor: 4 * tensor)
            losses.total.backward()  # type: ignore[no-untyped-call]
            torch.cuda.set_sync_debug_mode("default")
        assert model.w_enc_ND.grad is not None
        figures.append([losses.total.detach().cpu(), losses.active_B.cpu(), model.w_enc_ND.grad.cpu()])
        assert int(losses.active_B.sum()) == 8 * len(x_BD)
    for ours, want in zip(*figures, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-6)


def test_more_than_twice_its_share_on_one_rank_is_never_hidden() -> None:
    """All pairs of a batch of four ranks on one: a CPU keeps them all, a GPU has no room and says so."""
    losses = {}
    for device in ("cuda", "cpu"):
        run = Run("batch_topk", device)
        x_BD = run.batches[0]
        losses[device] = run.model.loss(x_BD, run.dead_N, 4 * len(x_BD))
    assert losses["cuda"].total.isnan()
    assert int(losses["cpu"].active_B.sum()) == 4 * 8 * 512


@EVERY
def test_steps_equal_those_on_a_cpu(kind: str) -> None:
    torch.testing.assert_close(Run(kind, "cuda").losses(), Run(kind, "cpu").losses(), rtol=1e-4, atol=0)


@EVERY
def test_steps_repeat_bit_for_bit(kind: str) -> None:
    one, two = Run(kind, "cuda"), Run(kind, "cuda")
    assert torch.equal(one.losses(), two.losses())
    for name, parameter in one.model.named_parameters():
        assert torch.equal(parameter, two.model.get_parameter(name)), name


@EVERY
def test_bfloat16_is_close(kind: str) -> None:
    half, full = Run(kind, "cuda", torch.bfloat16), Run(kind, "cuda")
    torch.testing.assert_close(half.losses(), full.losses(), rtol=0.02, atol=0)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
