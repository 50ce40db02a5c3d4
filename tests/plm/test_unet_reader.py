"""The UNet's reader against `UNet.forward`: every layer of every kind of UNet, few graphs for all blocks and packs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plmsae_cli.plm.alphabet import MASK, Packed, encode, pack
from plmsae_cli.plm.unet import UNet
from plmsae_cli.plm.unet_config import UNetConfig
from plmsae_cli.plm.unet_reader import UNetReader

KINDS = {
    "whole": UNetConfig(6, 32, 2),
    "two blocks": UNetConfig(2, 32, 2),
    "plain": UNetConfig(3, 32, 2, unet=False),
    "no value embeddings": UNetConfig(4, 32, 2, value_embeddings=False),
    "no mask embedding": UNetConfig(4, 32, 2, mask_embedding=False),
    "capped, learned tokens": UNetConfig(4, 32, 2, attention_soft_cap=5.0, num_att_tokens=24),
}
PROTEINS = ["MKTAYIAKQRQISFVKSHFSRQ", "MSHHWGYGKHNGPEHWHKDF", "M", "ACDEFGHIKLMNPQRSTVWY" * 3, "MVLSPADKTNVKAAWGKVG"]


def unet(config: UNetConfig) -> UNet:
    """With every parameter drawn: at its start a UNet's blocks add nothing."""
    model, generator = UNet(config).eval(), torch.Generator().manual_seed(1)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def packed(turn: int = 0, num_tokens: int = 192) -> Packed:
    made = pack([encode(s) for s in PROTEINS[turn:]], num_tokens=num_tokens, num_documents=12 + turn, max_len=64)
    made.tokens_T[5:9] = MASK
    return made


@torch.no_grad()
def forward(model: UNet, batch: Packed) -> dict[int, Tensor]:
    return model(batch.tokens_T, batch.documents, layers=range(model.config.num_layers + 1)).hidden  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_that_of_the_model(kind: str) -> None:
    model, batch = unet(KINDS[kind]), packed()
    expected = forward(model, batch)
    found = dict(UNetReader(model).layers(batch.tokens_T, batch.documents, range(model.config.num_layers + 1)))
    assert list(found) == list(expected)
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("deepest", range(6))
def test_blocks_above_the_deepest_layer_are_not_run(deepest: int) -> None:
    model, batch = unet(KINDS["whole"]), packed()
    expected = forward(model, batch)
    with torch.no_grad():
        for parameter in model.layers[deepest:].parameters():
            parameter.fill_(torch.nan)
    found = dict(UNetReader(model).layers(batch.tokens_T, batch.documents, {0, deepest}))
    assert sorted(found) == sorted({0, deepest})
    assert torch.equal(found[deepest], expected[deepest])


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("kind", ["whole", pytest.param("plain", marks=pytest.mark.slow)])
def test_what_is_traced_once_serves_all_blocks_and_packs(kind: str) -> None:
    model = unet(KINDS[kind])
    reader, every = UNetReader(model), range(model.config.num_layers + 1)
    torch._dynamo.utils.counters.clear()
    for turn, num_tokens in enumerate((192, 224)):
        batch = packed(turn, num_tokens)
        expected = forward(model, batch)
        with torch.compiler.set_stance("default" if turn == 0 else "fail_on_recompile"):
            found = dict(reader.layers(batch.tokens_T, batch.documents, every, compiled=True, any_length=True))
        assert all(torch.allclose(found[k], expected[k], rtol=1e-5, atol=1e-5) for k in every)
    # Of a UNet's halves each its own way in, one way on in each, and one way out.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (5 if kind == "whole" else 3)


def test_layers_that_do_not_exist_are_named() -> None:
    reader, batch = UNetReader(unet(KINDS["two blocks"])), packed()
    for wanted in ([3], [-1, 2], []):
        with pytest.raises(ValueError, match="layers 0 to 2"):
            next(reader.layers(batch.tokens_T, batch.documents, wanted))
