"""What only a GPU shows of the fused step: graphs, waits, repeatability."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plmsae_cli.runtime.dist import Gang
from plmsae_cli.sae.batch_topk import BatchTopK
from plmsae_cli.sae.fused.given import AdamOptions, Batch, Masters
from plmsae_cli.sae.fused.graphs import Graphs, launched
from plmsae_cli.sae.fused.jump import FusedJumpStep
from plmsae_cli.sae.fused.step import FusedStep
from plmsae_cli.sae.fused.switch import FusedSwitchStep
from plmsae_cli.sae.jumprelu import JumpReLU
from plmsae_cli.sae.matryoshka import MatryoshkaBatchTopK, MatryoshkaTopK
from plmsae_cli.sae.switch import Switch
from plmsae_cli.sae.topk import TopK

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

D, N, K, ROWS, STEPS = 96, 2048, 12, 512, 60
KINDS: dict[str, tuple[Any, Any]] = {
    "topk": (lambda: TopK(D, N, K), FusedStep),
    "matryoshka_topk": (lambda: MatryoshkaTopK(D, N, K), FusedStep),
    "batch_topk": (lambda: BatchTopK(D, N, K), FusedStep),
    "matryoshka_batch_topk": (lambda: MatryoshkaBatchTopK(D, N, K), FusedStep),
    "jumprelu": (lambda: JumpReLU(D, N, theta_start=2.5, bandwidth=0.5, sparsity_coefficient=1e-5), FusedJumpStep),
    "jumprelu, all latents": (lambda: JumpReLU(D, N, sparsity_coefficient=1e-5), FusedJumpStep),
    "switch": (lambda: Switch(D, N, K, 8), FusedSwitchStep),
}
EVERY = pytest.mark.parametrize("kind", list(KINDS))


class Run:
    def __init__(self, kind: str, window: int = 24 * ROWS, graphs: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        make, make_step = KINDS[kind]
        self.model = make()
        with torch.no_grad():
            rows_ND = torch.randn(N, D, generator=generator)
            self.model.w_dec_ND.copy_(rows_ND)
            self.model.normalize_decoder()
            self.model.w_enc_ND.copy_(self.model.w_dec_ND)
            self.model.b_enc_N[::3] = -3.0  # these die
            self.model.b_enc_N[5] = 3.0  # this fires on every token
            if isinstance(self.model, Switch):
                self.model.w_router_ED.copy_(torch.randn(8, D, generator=generator) * 0.2)
        self.model = self.model.cuda()
        state, masters = {}, {name: p.detach() for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            state |= {f"{name}.{what}": torch.zeros_like(parameter) for what in ("exp_avg", "exp_avg_sq")}
            state[f"{name}.step"] = torch.zeros((), device="cuda")
        self.ages_N = torch.zeros(N, dtype=torch.int64, device="cuda")
        batch = Batch(ROWS, torch.zeros(D, device="cuda"), 1.0, window)
        adam = AdamOptions((0.9, 0.999), 6.25e-10, 1.0 / D)
        self.step = make_step(self.model, Masters(masters, state, self.ages_N), batch, adam, Gang())
        if not graphs:
            self.step._replay = launched
        self.batches = [torch.randn(ROWS, D, generator=generator).cuda() for _ in range(3)]

    def go(self, steps: int = STEPS) -> torch.Tensor:
        seen = []
        for step in range(steps):
            figures = self.step(self.batches[step % 3], step, 1e-3 / (1 + step % 5))  # a rate is no part of a graph
            seen.append(torch.stack(list(figures.values())))
        return torch.stack(seen).cpu()


@EVERY
def test_replayed_steps_are_the_launched_ones(kind: str) -> None:
    replayed, launched = Run(kind), Run(kind, graphs=False)
    figures = replayed.go()
    assert isinstance(replayed.step._replay, Graphs)
    if isinstance(replayed.model, TopK):
        assert figures[-1, 5] > 0.1, "some latents were to die, so that AuxK has work"
        assert len(replayed.step._replay.graphs) > 1, "graphs with and without the dead"
    if isinstance(replayed.step, FusedJumpStep):
        assert int(replayed.step._encode.dense) == int("all" in kind)
    assert torch.equal(figures, launched.go())
    for name, parameter in replayed.model.named_parameters():
        assert torch.equal(parameter, launched.model.get_parameter(name)), name


@EVERY
def test_steps_repeat_bit_for_bit(kind: str) -> None:
    one, two = Run(kind), Run(kind)
    assert torch.equal(one.go(), two.go())
    for name, parameter in one.model.named_parameters():
        assert torch.equal(parameter, two.model.get_parameter(name)), name


@EVERY
def test_a_step_never_waits_for_the_gpu(kind: str) -> None:
    run = Run(kind)
    run.go(STEPS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(STEPS, STEPS + 8):
            run.step(run.batches[0], step, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@EVERY
def test_the_loss_falls(kind: str) -> None:
    figures = Run(kind).go(150)
    assert figures[-1, 3] < 0.8 * figures[0, 3]
