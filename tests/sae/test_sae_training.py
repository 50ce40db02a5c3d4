"""Dictionaries learn: data made of known sparse features is reconstructed, and its features are found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from plmsae_cli.sae.batch_topk import BatchTopK
from plmsae_cli.sae.dead import DeadLatents
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.export import fold
from plmsae_cli.sae.fidelity import Fidelity
from plmsae_cli.sae.gated import Gated
from plmsae_cli.sae.initialise import initialise
from plmsae_cli.sae.jumprelu import JumpReLU
from plmsae_cli.sae.matryoshka import MatryoshkaBatchTopK, MatryoshkaTopK
from plmsae_cli.sae.multi_topk import MultiTopK
from plmsae_cli.sae.relu_l1 import ReLUL1
from plmsae_cli.sae.switch import Switch
from plmsae_cli.sae.topk import TopK
from plmsae_cli.training.optimizers import Adam, Group
from plmsae_cli.training.schedules import learning_rate

D, FEATURES, ACTIVE, BATCH, STEPS = 24, 48, 3, 256, 600
LATENTS, K = 2 * FEATURES, 2 * ACTIVE


def batch(features_FD: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each token is a sum of three features of strength 1 to 2."""
    chosen = torch.rand(BATCH, FEATURES, generator=generator).argsort(1) < ACTIVE
    return (chosen * (1 + torch.rand(BATCH, FEATURES, generator=generator))) @ features_FD


Make = Callable[[], Dictionary]
KINDS: dict[str, tuple[Make, float]] = {
    "topk": (lambda: TopK(D, LATENTS, K), 0.1),
    "topk, annealed": (lambda: TopK(D, LATENTS, K, k_start=4 * K, k_anneal=0.3), 0.1),
    "multi_topk": (lambda: MultiTopK(D, LATENTS, K), 0.1),
    "matryoshka_topk": (lambda: MatryoshkaTopK(D, LATENTS, K), 0.15),
    "batch_topk": (lambda: BatchTopK(D, LATENTS, K), 0.1),
    "matryoshka_batch_topk": (lambda: MatryoshkaBatchTopK(D, LATENTS, K), 0.15),
    "jumprelu": (lambda: JumpReLU(D, LATENTS, target_l0=K, bandwidth=0.3, theta_start=0.3), 0.15),
    "jumprelu, tanh": (lambda: JumpReLU(D, LATENTS, 0.2, penalty="tanh"), 0.15),
    "gated": (lambda: Gated(D, LATENTS, 1.0), 0.15),
    "relu_l1": (lambda: ReLUL1(D, LATENTS, 1.0), 0.15),
    "relu_l1, unit rows": (lambda: ReLUL1(D, LATENTS, 1.0, unit_rows=True), 0.15),
    "switch": (lambda: Switch(D, LATENTS, K, 2, 0.1), 0.4),
}


@pytest.mark.parametrize("name", list(KINDS))
def test_sparse_features_are_learned(name: str) -> None:
    """Twice as many latents and twice as many active as features; six principal components leave 0.48."""
    make, bound = KINDS[name]
    generator = torch.Generator().manual_seed(0)
    features_FD = torch.nn.functional.normalize(torch.randn(FEATURES, D, generator=generator), dim=1)
    sample_BD = torch.cat([batch(features_FD, generator) for _ in range(20)])
    mean_D = sample_BD.mean(0)
    scale = float((D / (sample_BD - mean_D).square().sum(1).mean()).sqrt())
    model = make()
    initialise(model, 0, (batch(features_FD, generator) - mean_D) * scale)
    optimizer = Adam([Group("sae", dict(model.named_parameters()))], betas=(0.9, 0.999), eps=6.25e-10)
    dead = DeadLatents(model.num_latents)
    for step in range(STEPS):
        x_BD = (batch(features_FD, generator) - mean_D) * scale
        model.schedule(step, STEPS)
        losses = model.loss(x_BD, dead.mask(5000), BATCH)
        optimizer.zero_grad()
        losses.total.backward()  # type: ignore[no-untyped-call]
        model.project_gradients()
        optimizer.step(learning_rate(step, STEPS, 5e-3, 20, 0.2), max_norm=1.0)
        model.normalize_decoder()
        dead.update(losses.fired_N, BATCH)

    fidelity = Fidelity(model.num_latents)
    model.eval()
    exported = fold(model, mean_D, scale)
    with torch.inference_mode():
        for _ in range(8):
            raw_BD = batch(features_FD, generator)
            latents = exported.encode(raw_BD)
            fidelity.update(raw_BD, exported.decode(latents), latents, mean_D)
    result = fidelity.result()
    found_F = (features_FD @ exported.w_dec_ND.T).amax(1)
    assert result["fvu"] < bound
    assert found_F.mean() > 0.8
    assert result["l0_mean"] <= 2.2 * K
