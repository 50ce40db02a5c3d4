"""The contact head is fair-esm's, with random weights in both."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from plmsae_cli.config.errors import UserError
from plmsae_cli.plm.alphabet import encode, pack
from plmsae_cli.plm.contacts import attention_contacts
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.store.contact_head import contact_head_file, load_contact_head
from plmsae_cli.store.fs import Store
from plmsae_cli.store.weight_names import from_fair_esm
from plmsae_cli.store.weights import save_model

esm = pytest.importorskip("esm")
SEQUENCE = "MKTWACDEFGHIKLMNPQRSTVWYAC"


@pytest.fixture(scope="module")
def peer() -> Any:
    torch.manual_seed(0)
    model = esm.model.esm2.ESM2(num_layers=3, embed_dim=32, attention_heads=4, token_dropout=True).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def ours(peer: Any) -> ESM2:
    state = from_fair_esm(peer.state_dict(), "peer")
    model = ESM2(ESM2Config(num_layers=3, d=32, num_heads=4)).eval()
    model.load_state_dict(state)
    return model


def test_probabilities_are_fair_esms(peer: Any) -> None:
    packed = pack([encode(SEQUENCE)])
    with torch.no_grad():
        wanted = peer.predict_contacts(packed.tokens_T.long()[None])[0]
    head = peer.contact_head.regression
    found = attention_contacts(ours(peer), packed.tokens_T, head.weight[0], head.bias[0])
    assert wanted.std() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def test_a_splice_is_seen_by_the_layers_above_and_in_the_last_by_none(peer: Any) -> None:
    packed, model, head = pack([encode(SEQUENCE)]), ours(peer), peer.contact_head.regression
    weight, bias = head.weight[0], head.bias[0]
    plain = attention_contacts(model, packed.tokens_T, weight, bias)
    assert torch.equal(attention_contacts(model, packed.tokens_T, weight, bias, {1: torch.clone}), plain)
    assert torch.equal(attention_contacts(model, packed.tokens_T, weight, bias, {3: torch.zeros_like}), plain)
    spliced = attention_contacts(model, packed.tokens_T, weight, bias, {1: lambda x: 0.5 * x.flip(1)})
    handle = peer.layers[0].register_forward_hook(lambda _, __, out: (0.5 * out[0].flip(-1), *out[1:]))
    with torch.no_grad():
        wanted = peer.predict_contacts(packed.tokens_T.long()[None])[0]
    handle.remove()
    torch.testing.assert_close(spliced, wanted, rtol=0, atol=2e-6)
    assert not torch.allclose(spliced, plain, atol=1e-4)


def test_the_head_is_found_where_it_is_published(peer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = peer.contact_head.regression
    regression = {f"contact_head.regression.{name}": getattr(head, name).detach() for name in ("weight", "bias")}
    # As fair-esm: a file beside the weights.
    torch.save({"model": regression}, tmp_path / "mine-contact-regression.pt")
    weight, bias = load_contact_head(str(tmp_path / "mine.pt"), Store(), 12)
    assert torch.equal(weight, head.weight[0])
    assert torch.equal(bias, head.bias[0])
    with pytest.raises(UserError, match="for 12 attention heads, the model has 20"):
        load_contact_head(str(tmp_path / "mine.pt"), Store(), 20)
    # By name: in the cache.
    monkeypatch.setenv("PLMSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert contact_head_file("esm2_t6_8M_UR50D", Store()) is None
    with pytest.raises(UserError) as caught:
        load_contact_head("esm2_t6_8M_UR50D", Store(), 120)
    assert "regression/esm2_t6_8M_UR50D-contact-regression.pt" in str(caught.value.hint)
    (tmp_path / "cache" / "weights").mkdir(parents=True)
    torch.save({"model": regression}, tmp_path / "cache" / "weights" / "esm2_t6_8M_UR50D-contact-regression.pt")
    assert contact_head_file("esm2_t6_8M_UR50D", Store()) is not None


def test_a_hugging_face_folder_brings_its_own(peer: Any, tmp_path: Path) -> None:
    head = peer.contact_head.regression
    state = {f"esm.contact_head.regression.{name}": getattr(head, name).detach() for name in ("weight", "bias")}
    save_file({**state, "lm_head.bias": torch.zeros(33)}, tmp_path / "model.safetensors")
    weight, bias = load_contact_head(str(tmp_path), Store(), 12)
    assert torch.equal(weight, head.weight[0])
    assert torch.equal(bias, head.bias[0])


def test_weights_of_our_own_have_none(tmp_path: Path) -> None:
    model = ESM2(ESM2Config(2, 32, 2))
    save_model(Store(), str(tmp_path), dict(model.state_dict()), asdict(model.config), {})
    assert contact_head_file(str(tmp_path), Store()) is None
    assert contact_head_file("bundled", Store()) is None
