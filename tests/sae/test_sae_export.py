from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch

from plmsae_cli.sae.architectures import ARCHITECTURES
from plmsae_cli.sae.batch_topk import BatchTopK
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.export import fold, from_state, to_state
from plmsae_cli.sae.initialise import initialise
from plmsae_cli.sae.jumprelu import JumpReLU

MEAN_D, SCALE = torch.linspace(-40, 30, 16), 0.3


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, {"k": 5} if "k" in inspect.signature(kind).parameters else {})
        for name, kind in ARCHITECTURES.items()
    },
    "jumprelu, tanh": ("jumprelu", {"penalty": "tanh"}),
    "relu_l1, unit rows": ("relu_l1", {"unit_rows": True}),
}


def model_of(variant: str) -> Dictionary:
    """As after training: no parameter is at its start, and free decoder rows have any norm."""
    architecture, settings = VARIANTS[variant]
    model = ARCHITECTURES[architecture](16, 64, **settings)
    generator = torch.Generator().manual_seed(0)
    initialise(model, 0, torch.randn(50, 16, generator=generator))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "log_theta_N":
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        if isinstance(model, JumpReLU):
            model.log_theta_N.uniform_(-1.5, 0.5, generator=generator)
        if isinstance(model, BatchTopK):
            model.theta.fill_(0.9)
        model.normalize_decoder()
        model.maximum_N.uniform_(1, 2, generator=generator)
    return model.eval()


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_largest_activations_are_those_of_all_latents(variant: str) -> None:
    model = model_of(variant)
    x_BD = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    z_BN = torch.zeros(3, 64).scatter(1, *reversed(model.encode(x_BD)))
    assert (z_BN.amax(0) == 0).any(), "some latent is silent"
    torch.testing.assert_close(model.largest(x_BD), z_BN.amax(0))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_folded_eats_raw_activations(variant: str) -> None:
    model = model_of(variant)
    folded = fold(model, MEAN_D, SCALE)
    raw_BD = MEAN_D + torch.randn(200, 16, generator=torch.Generator().manual_seed(1)) / SCALE
    norms_N = torch.ones(64) if model.unit_rows else model.w_dec_ND.norm(dim=1)
    inside_BN, raw_BN = model.encode_dense((raw_BD - MEAN_D) * SCALE), folded.encode_dense(raw_BD)
    assert 0 < (inside_BN > 0).sum() < inside_BN.numel() / 2
    torch.testing.assert_close(inside_BN * norms_N / SCALE, raw_BN, rtol=1e-4, atol=1e-4)
    want_BD = MEAN_D + model((raw_BD - MEAN_D) * SCALE) / SCALE
    torch.testing.assert_close(folded(raw_BD), want_BD, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(folded.decode(folded.encode(raw_BD)), want_BD, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(folded.w_dec_ND.norm(dim=1), torch.ones(64))
    torch.testing.assert_close(folded.maximum_N * SCALE, model.maximum_N * norms_N)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_state_and_back(variant: str) -> None:
    model = model_of(variant)
    tensors, config = to_state(model)
    copy = from_state(tensors, json.loads(json.dumps(config))).eval()
    assert config["architecture"] == VARIANTS[variant][0]
    assert type(copy) is type(model)
    assert copy.settings() == model.settings()
    x_BD = torch.randn(20, 16)
    assert torch.equal(copy(x_BD), model(x_BD))
    assert torch.equal(copy.maximum_N, model.maximum_N)


def test_states_that_do_not_fit_are_named() -> None:
    tensors, config = to_state(model_of("topk"))
    with pytest.raises(ValueError, match="unknown architecture 'relu': one of topk"):
        from_state(tensors, config | {"architecture": "relu"})
    with pytest.raises(ValueError, match=r"b_enc_N is \(64,\), not \(32,\)"):
        from_state(tensors, config | {"num_latents": 32})
    del tensors["w_dec_ND"]
    with pytest.raises(ValueError, match=r"w_dec_ND is absent, not \(64, 16\)"):
        from_state(tensors, config)
