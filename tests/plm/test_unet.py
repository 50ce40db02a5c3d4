"""The UNet transformer against its formulas written out in float64, and the operations with gradients of their own."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from plmsae_cli.plm.alphabet import MASK, encode, pack
from plmsae_cli.plm.attention import Documents, attention
from plmsae_cli.plm.gradients import EPSILON, lookup, rms_norm, scaled, taken
from plmsae_cli.plm.rotary import Rotary
from plmsae_cli.plm.unet import UNet
from plmsae_cli.plm.unet_config import UNetConfig
from tests.plm.unet_formulas import written_out

LENGTHS = (30, 9, 9, 17)


def model(**options: Any) -> UNet:
    """A small model in which every part has an effect."""
    made = UNet(UNetConfig(**{"num_layers": 4, "d": 32, "num_heads": 2, **options}))
    made.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made.double()


def stream() -> Any:
    letters = torch.randint(4, 24, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).to(torch.uint8).numpy()
    letters[::5] = MASK
    edges = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    return pack([letters[a:b] for a, b in pairwise(edges)])


@pytest.mark.parametrize(
    ("options", "window"),
    [
        ({}, None),
        ({}, 7),
        ({"unet": False}, None),
        ({"mask_embedding": False}, None),
        ({"mask_embedding": False, "unet": False, "tie_embeddings": True}, 7),
        ({"value_embeddings": False, "tie_embeddings": True, "soft_logit_cap": 2.0}, None),
        ({"attention_soft_cap": 0.5, "num_att_tokens": 5}, 7),
    ],
    ids=str,
)
def test_layers_and_logits_are_the_formulas(options: dict[str, Any], window: int | None) -> None:
    net, packed = model(**options), stream()
    everything = range(net.config.num_layers + 1)
    # The rotation is in float32 by design, which float64 elsewhere shows as 1e-7.
    found = net(packed.tokens_T, packed.documents, layers=everything, logits=True, window=window)
    edges = packed.cu_seqlens.tolist()
    weights = {name: p.detach() for name, p in net.named_parameters()}
    for start, end in pairwise(edges):
        layers, logits = written_out(net.config, weights, packed.tokens_T[start:end].long(), window)
        for k in everything:
            torch.testing.assert_close(found.hidden[k][start:end], layers[k], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.logits[start:end].double(), logits, rtol=1e-5, atol=1e-5)


def test_the_speed_runs_model_has_133065357_parameters() -> None:
    with torch.device("meta"):
        net = UNet(UNetConfig(24, 768, 6))
    assert sum(p.numel() for p in net.parameters()) == net.config.num_parameters == 133_065_357


@pytest.mark.parametrize(
    "options",
    [
        {"tie_embeddings": True},
        {"unet": False},
        {"value_embeddings": False},
        {"num_att_tokens": 7},
        {"expansion_ratio": 2},
    ],
    ids=str,
)
def test_parameters_are_counted_for_every_option(options: dict[str, Any]) -> None:
    config = UNetConfig(**{"num_layers": 4, "d": 48, "num_heads": 2, **options})
    with torch.device("meta"):
        assert config.num_parameters == sum(p.numel() for p in UNet(config).parameters())


def test_flops_are_three_times_the_products_of_a_forward() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    net = UNet(UNetConfig(4, 64, 2))
    net.init_weights(0)
    packed = pack([encode("M" * 30)] * 4)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        net(packed.tokens_T, packed.documents, logits=True)
    assert net.config.train_flops(32, 1.0) * 128 == 3 * counter.get_total_flops()


def test_a_pass_goes_on_from_any_layer_as_from_its_splice() -> None:
    net, packed = model(), stream()
    for k in range(5):
        below = net.below(packed.tokens_T, packed.documents, k)
        spliced = net(packed.tokens_T, packed.documents, splice={k: torch.sin}, logits=True)
        assert torch.equal(net.head(net.above(below, below.x_TD.sin())), spliced.logits)


def test_a_splice_is_what_the_layers_above_see_through_skips_too() -> None:
    net, packed = model(), stream()
    read = net(packed.tokens_T, packed.documents, layers=range(5)).hidden
    same = net(packed.tokens_T, packed.documents, layers=[4], splice={k: lambda x: x * 1 for k in range(5)})
    torch.testing.assert_close(same.hidden[4], read[4])
    other = net(packed.tokens_T, packed.documents, layers=[1, 2, 4], splice={1: torch.zeros_like})
    torch.testing.assert_close(other.hidden[1], read[1], msg="a layer is read before its splice")
    with torch.no_grad():
        net.skip_weights[1] = 0.0  # the skip from block 1 ends in the last block
    unskipped = net(packed.tokens_T, packed.documents, layers=[4], splice={1: torch.zeros_like}).hidden[4]
    torch.testing.assert_close(other.hidden[4], unskipped, msg="a zero that was spliced in went up the skip")
    for wrong in ([5], [-1]):
        with pytest.raises(ValueError, match="has layers 0 to 4"):
            net(packed.tokens_T, packed.documents, layers=wrong)
    with pytest.raises(ValueError, match="nothing asked for"):
        net(packed.tokens_T, packed.documents)


def test_all_2048_positions_differ_in_bfloat16_models() -> None:
    cos, sin = model().to(torch.bfloat16).rotary(torch.arange(2048))
    assert cos.dtype == torch.float32
    assert len(torch.unique(torch.cat([cos, sin], -1)[:, 0], dim=0)) == 2048


@pytest.mark.parametrize(("window", "soft_cap"), [(5, None), (None, 0.7), (5, 0.7), (64, None)])
def test_attention_sees_its_window_and_caps_scores(window: int | None, soft_cap: float | None) -> None:
    q, k, v = torch.randn(
        3, sum(LENGTHS), 2, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    ).unbind()
    edges = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(len(document))
    seen = document[:, None] == document
    if window is not None:
        seen &= (place[:, None] - place).abs() < window
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(8)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    expected = torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)
    found = attention(q, k, v, *Documents(edges, max(LENGTHS), LENGTHS), window=window, soft_cap=soft_cap)
    # Capped scores are computed in float32, as the kernels do.
    torch.testing.assert_close(found, expected, rtol=1e-5 if soft_cap else 1e-9, atol=1e-6 if soft_cap else 1e-9)


def test_gradients_of_lookups_scales_and_places_are_autograds() -> None:
    generator = torch.Generator().manual_seed(4)
    table = torch.randn(33, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 33, (50,), generator=generator)
    assert torch.autograd.gradcheck(lambda t: lookup(t, tokens), table)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    # The sum over a row is in float32, so its own formula is the oracle instead of finite differences.
    upstream = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    mine = torch.autograd.grad(scaled(x, weight), (x, weight), upstream)
    plain = torch.autograd.grad(x * weight, (x, weight), upstream)
    torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(lambda t: taken(t, torch.tensor([3, 0, 4])), x)
    torch.testing.assert_close(rms_norm(x).square().mean(-1), torch.ones(5, dtype=torch.float64), rtol=1e-4, atol=0)


def test_a_head_on_a_stream_of_zeros_has_the_gradient_of_two_norms() -> None:
    """At 0 a norm is x / sqrt(eps), two are x / eps, and GELU is x / 2: what the first step sends into the blocks at <mask>."""
    net = model(mask_embedding=False)
    x = torch.zeros(1, 32, dtype=torch.float64, requires_grad=True)
    net.head(x)[0, 7].backward()
    head = net.lm_head
    slope = 1 - torch.tanh(head.bias_V[7] / head.cap) ** 2
    torch.testing.assert_close(x.grad[0], slope / EPSILON / 2 * head.decoder_VD[7] @ head.dense_DD, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 3}, "two halves"),
        ({"num_heads": 3}, "same even width"),
        ({"architecture": "esm2"}, "is not unet"),
    ],
)
def test_shapes_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{"num_layers": 4, "d": 32, "num_heads": 2, **options})


def test_a_start_is_the_same_for_a_seed_in_every_dtype() -> None:
    one, other, third = (UNet(UNetConfig(2, 32, 2)) for _ in range(3))
    one.init_weights(3)
    other.to(torch.bfloat16).init_weights(3)
    third.init_weights(4)
    for a, b, c in zip(one.parameters(), other.parameters(), third.parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b)
        assert a.ndim < 2 or not a.any() or not torch.equal(a, c)
    assert isinstance(one.rotary, Rotary)


@pytest.mark.parametrize("tied", [False, True])
def test_a_start_is_the_published_one(tied: bool) -> None:
    """Nothing is written into the stream, nothing of x0 mixed in, half of the values are the token's, skips are whole."""
    d = 64
    made = UNet(UNetConfig(4, d, 2, tie_embeddings=tied, num_att_tokens=200))
    made.init_weights(0)
    known = {
        "out_DD": [0.0], "down_DF": [0.0], "bias_V": [0.0], "residual_mix_2": [1.0, 0.0], "value_mix_2": [0.5, 0.5],
        "skip_weights": [1.0, 1.0],
    }  # fmt: skip
    for name, parameter in made.named_parameters():
        kind = name.rpartition(".")[2]
        if kind in known:
            assert torch.equal(parameter, torch.tensor(known[kind]).expand_as(parameter)), name
        elif "embedding" in name or "value_tables" in name or kind in ("keys_3ND", "values_3ND"):
            deviation = 1 / math.sqrt(d) if tied and kind == "embedding_VD" else 1.0
            assert float(parameter.std()) == pytest.approx(deviation, rel=0.06), name
        else:
            bound = 1 / math.sqrt(parameter.shape[-1])
            assert 0.98 * bound < float(parameter.max()) <= bound, name
            assert -bound <= float(parameter.min()) < -0.98 * bound, name
            assert float(parameter.std()) == pytest.approx(bound / math.sqrt(3), rel=0.06), name
