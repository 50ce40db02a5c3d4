"""Dictionaries learn: data made of known sparse features is reconstructed, and its features are found."""

from __future__ import annotations

import pytest
import torch

from plmsae_cli.sae.dead import DeadLatents
from plmsae_cli.sae.fidelity import Fidelity
from plmsae_cli.sae.initialise import initialise
from plmsae_cli.sae.matryoshka import MatryoshkaTopK
from plmsae_cli.sae.topk import TopK
from plmsae_cli.training.optimizers import Adam, Group
from plmsae_cli.training.schedules import learning_rate

D, FEATURES, ACTIVE, BATCH, STEPS = 24, 48, 3, 256, 600


def batch(features_FD: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each token is a sum of three features of strength 1 to 2."""
    chosen = torch.rand(BATCH, FEATURES, generator=generator).argsort(1) < ACTIVE
    return (chosen * (1 + torch.rand(BATCH, FEATURES, generator=generator))) @ features_FD


@pytest.mark.parametrize(("kind", "bound"), [(TopK, 0.1), (MatryoshkaTopK, 0.15)])
def test_sparse_features_are_learned(kind: type[TopK], bound: float) -> None:
    """Twice as many latents and twice as many active as features; six principal components leave 0.48."""
    generator = torch.Generator().manual_seed(0)
    features_FD = torch.nn.functional.normalize(torch.randn(FEATURES, D, generator=generator), dim=1)
    model = kind(D, 2 * FEATURES, k=2 * ACTIVE)
    initialise(model, 0, batch(features_FD, generator))
    optimizer = Adam([Group("sae", dict(model.named_parameters()))], betas=(0.9, 0.999), eps=6.25e-10)
    dead = DeadLatents(model.num_latents)
    for step in range(STEPS):
        x_BD = batch(features_FD, generator)
        losses = model.loss(x_BD, dead.mask(5000), BATCH)
        optimizer.zero_grad()
        losses.total.backward()
        model.project_gradients()
        optimizer.step(learning_rate(step, STEPS, 5e-3, 20, 0.2), max_norm=1.0)
        model.normalize_decoder()
        dead.update(losses.fired_N, BATCH)

    fidelity = Fidelity(model.num_latents)
    mean_D = torch.cat([batch(features_FD, generator) for _ in range(20)]).mean(0)
    for _ in range(8):
        x_BD = batch(features_FD, generator)
        latents = model.encode(x_BD)
        fidelity.update(x_BD, model.decode(latents), latents, mean_D)
    result = fidelity.result()
    found_F = (features_FD @ model.w_dec_ND.T).amax(1)
    assert result["fvu"] < bound
    assert found_F.mean() > 0.8
    assert result["l0_mean"] <= 2 * ACTIVE
