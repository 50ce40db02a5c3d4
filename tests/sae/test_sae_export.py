from __future__ import annotations

import json

import pytest
import torch

from plmsae_cli.sae.architectures import ARCHITECTURES
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.export import fold, from_state, to_state
from plmsae_cli.sae.initialise import initialise

MEAN_D, SCALE = torch.linspace(-40, 30, 16), 0.3


def model_of(architecture: str) -> Dictionary:
    model = ARCHITECTURES[architecture](16, 64, k=5)
    torch.manual_seed(0)
    initialise(model, 0, torch.randn(50, 16))
    with torch.no_grad():
        model.b_enc_N.normal_(std=0.1)
        model.maximum_N.uniform_(1, 2)
    return model


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_folded_eats_raw_activations(architecture: str) -> None:
    model = model_of(architecture)
    folded = fold(model, MEAN_D, SCALE)
    raw_BD = MEAN_D + torch.randn(200, 16) / SCALE
    inside, raw = model.encode((raw_BD - MEAN_D) * SCALE), folded.encode(raw_BD)
    assert torch.equal(inside.indices_BK.sort().values, raw.indices_BK.sort().values)
    torch.testing.assert_close(inside.acts_BK / SCALE, raw.acts_BK, rtol=1e-4, atol=1e-4)
    want_BD = MEAN_D + model((raw_BD - MEAN_D) * SCALE) / SCALE
    torch.testing.assert_close(folded(raw_BD), want_BD, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(folded.w_dec_ND.norm(dim=1), torch.ones(64))
    torch.testing.assert_close(folded.maximum_N * SCALE, model.maximum_N)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_state_and_back(architecture: str) -> None:
    model = model_of(architecture)
    tensors, config = to_state(model)
    copy = from_state(tensors, json.loads(json.dumps(config)))
    assert config["architecture"] == architecture
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
