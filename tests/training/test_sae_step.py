"""Whole steps of an SAE's training beside the papers' formulas: dense, in float64, with nothing of ours but the start."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from plmsae_cli.config.sae import SAE
from plmsae_cli.config.training import Train
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.training.sae_objective import SAEObjective
from plmsae_cli.training.stream import BlockStream
from tests.training.conftest import RandomRows

D, N, K, BATCH, STEPS = 8, 48, 3, 64, 8
LR, WARMUP, CLIP, EPS, WINDOW, K_AUX = 0.02, 2, 1.5, 1e-3, BATCH, 4
MEAN_D, SCALE = torch.linspace(-3, 5, D), 0.7
MASTERS = ("w_enc_ND", "b_enc_N", "w_dec_ND", "b_dec_D")


class Rows(RandomRows):
    """Heavy-tailed, around `MEAN_D`."""

    def rows(self, step: int) -> Tensor:
        return MEAN_D + super().rows(step) ** 3 / SCALE


def objective(architecture: str, **train: Any) -> SAEObjective:
    sae = SAE(architecture=architecture, num_latents=N, k=K, k_aux=K_AUX)  # type: ignore[arg-type]
    options = Train(
        sae=sae, batch_tokens=BATCH, lr=LR, lr_warmup_steps=WARMUP, grad_clip=CLIP, eps=EPS, dead_tokens=WINDOW, **train
    )
    made = SAEObjective(
        options, cast(BlockStream, Rows(BATCH, D)), MEAN_D, SCALE, STEPS, Gang(), torch.device("cpu"), torch.float32
    )
    made.start(Rows(BATCH, D).rows(99))
    return made


def top(scores_BN: Tensor, k: int) -> Tensor:
    return torch.zeros_like(scores_BN).scatter(1, scores_BN.detach().topk(k, dim=1).indices, 1.0)


class Papers:
    """TopK, BatchTopK (Gao et al. 2024, Bussmann et al. 2024) and their Matryoshkas, by autograd of what is written."""

    def __init__(self, start: SAEObjective) -> None:
        self.p = {name: start.model.get_parameter(name).detach().double() for name in MASTERS}
        self.prefixes = start.model.prefixes
        self.over_batch = "Batch" in type(start.model).__name__
        self.ages_N = torch.zeros(N, dtype=torch.int64)
        self.moments = {name: (torch.zeros_like(t), torch.zeros_like(t)) for name, t in self.p.items()}

    def step(self, step: int) -> dict[str, float]:
        x_BD = (Rows(BATCH, D).rows(step).double() - MEAN_D) * SCALE
        p = {name: tensor.clone().requires_grad_() for name, tensor in self.p.items()}
        dead_N = self.ages_N >= WINDOW
        a_BN = (x_BD - p["b_dec_D"]) @ p["w_enc_ND"].T + p["b_enc_N"]
        kept_BN = top(a_BN.relu().view(1, -1), BATCH * K).view_as(a_BN) if self.over_batch else top(a_BN, K)
        z_BN = a_BN.relu() * kept_BN
        xhats = [z_BN[:, :m] @ p["w_dec_ND"][:m] + p["b_dec_D"] for m in self.prefixes]
        reconstruction = torch.stack([(x_BD - xhat).square().sum() for xhat in xhats]).mean() / (BATCH * D)
        error_BD = (x_BD - xhats[-1]).detach()
        aux = torch.zeros((), dtype=torch.float64)
        if dead_N.any():
            dead_BN = a_BN[:, dead_N]
            ehat_BD = (dead_BN.relu() * top(dead_BN, min(K_AUX, dead_BN.shape[1]))) @ p["w_dec_ND"][dead_N]
            length, energy = ehat_BD.detach().square().sum(), error_BD.square().sum()
            fitted = torch.maximum((ehat_BD.detach() * error_BD).sum() / length, (energy / length).sqrt() / 10)
            aux = (fitted.clamp(max=1) * ehat_BD - error_BD).square().sum() / energy
            aux = aux * min(1.0, int(dead_N.sum()) / K_AUX)
        total = reconstruction + aux / 32
        total.backward()  # type: ignore[no-untyped-call]
        gradients = {name: cast(Tensor, tensor.grad) for name, tensor in p.items()}
        rows_ND, of_rows_ND = self.p["w_dec_ND"], gradients["w_dec_ND"]
        gradients["w_dec_ND"] = of_rows_ND - (of_rows_ND * rows_ND).sum(1, keepdim=True) * rows_ND
        norm = D * float(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt())
        decay_steps = round(0.2 * STEPS)
        rate = LR * min(1.0, (step + 1) / (WARMUP + 1), (STEPS - step) / (decay_steps + 1))
        for name, tensor in self.p.items():
            first, second = self.moments[name]
            g = gradients[name] * min(1.0, CLIP / norm)
            first.mul_(0.9).add_(0.1 * g)
            second.mul_(0.999).add_(0.001 * g.square())
            mean, square = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            tensor.sub_(rate * mean / (square.sqrt() + EPS))
        rows_ND.div_(rows_ND.norm(dim=1, keepdim=True))
        self.ages_N = torch.where((z_BN > 0).any(0), 0, self.ages_N + BATCH)
        active_B = (z_BN > 0).sum(1).double()
        return {
            "loss": total.item(), "reconstruction": reconstruction.item(), "aux": aux.item(), "grad_norm": norm,
            "fvu": float(error_BD.square().sum() / x_BD.square().sum()), "dead": float(dead_N.double().mean()),
            "l0": float(active_B.mean()), "l0_std": float(active_B.std(unbiased=False)),
        }  # fmt: skip


@pytest.mark.parametrize("architecture", ["topk", "matryoshka_topk", "batch_topk", "matryoshka_batch_topk"])
def test_steps_and_figures_are_those_of_the_papers(architecture: str) -> None:
    one = objective(architecture)
    papers = Papers(one)

    clipped, dead, uneven = set(), 0.0, 0.0
    for step in range(STEPS):
        want = papers.step(step)
        found = {name: value.item() for name, value in one.step(step).items()}
        assert found == pytest.approx(want, rel=1e-3, abs=1e-5), step
        for name, tensor in papers.p.items():
            torch.testing.assert_close(
                one.model.get_parameter(name).detach().double(),
                tensor,
                rtol=1e-4,
                atol=1e-5,
                msg=f"{name}, step {step}",
            )
        clipped.add(want["grad_norm"] > CLIP)
        dead, uneven = max(dead, want["dead"]), max(uneven, want["l0_std"])
    assert torch.equal(one.tensors()["tokens_since_fired_N"], papers.ages_N)
    assert dead > 0, "AuxK was at work"
    assert True in clipped
    assert (uneven > 0.5) == papers.over_batch
