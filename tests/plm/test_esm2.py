"""ESM-2 against fair-esm with random weights: every layer, every dtype, gradients, and what may not
change."""

from __future__ import annotations

from collections.abc import Callable

import esm
import pytest
import torch
from torch import Tensor

from plmsae_cli.plm.alphabet import MASK, PAD, Packed, encode, pack
from plmsae_cli.plm.esm2 import ESM2, PUBLISHED, ESM2Config
from plmsae_cli.plm.passes import ESM2Output
from plmsae_cli.plm.rotary import inverse_frequencies

Pair = tuple[torch.nn.Module, ESM2]
Reference = tuple[dict[int, Tensor], Tensor]
SMALL = ESM2Config(num_layers=3, d=32, num_heads=4)
TO_TOKENS = esm.data.Alphabet.from_architecture("ESM-1b").get_batch_converter()


@torch.no_grad()
def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def padded(sequences: list[str], masked: bool = False) -> Tensor:
    """fair-esm's batch [B, L]; with `masked` each sequence but the first has <mask> at its own rate."""
    _, _, tokens = TO_TOKENS([("", s) for s in sequences])
    if masked:
        for i, sequence in enumerate(sequences[1:], start=1):
            tokens[i, 1 : len(sequence) + 1 : i] = MASK  # sequence 1 is all masks
    return tokens


@pytest.fixture(scope="module")
def reference(gate_pair: Pair, proteins: list[str]) -> dict[bool, Reference]:
    """fair-esm's layers and logits in fp32 over all proteins, without masks and with."""
    return {masked: theirs(gate_pair[0], padded(proteins, masked)) for masked in (False, True)}


@torch.no_grad()
def theirs(peer: torch.nn.Module, tokens: Tensor) -> Reference:
    """Representations and logits of the real tokens, in the packed order; six sequences a padded batch."""
    layers = range(peer.num_layers + 1)  # type: ignore[arg-type]
    hidden: dict[int, list[Tensor]] = {k: [] for k in layers}
    logits = []
    for batch in tokens.split(6):
        real = batch != PAD
        width = int(real.sum(1).max())
        result = peer(batch[:, :width], repr_layers=layers)
        for k in layers:
            hidden[k].append(result["representations"][k][real[:, :width]])
        logits.append(result["logits"][real[:, :width]])
    return {k: torch.cat(parts) for k, parts in hidden.items()}, torch.cat(logits)


@torch.no_grad()
def ours(model: ESM2, tokens: Tensor, packed: Packed, **asked: object) -> ESM2Output:
    layers = range(model.config.num_layers + 1)
    return model(tokens[tokens != PAD], packed.documents, **{"layers": layers, "logits": True, **asked})  # type: ignore[no-any-return]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "gate"), [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_every_layer_and_the_logits_are_fair_esms(
    gate_pair: Pair,
    gate_config: ESM2Config,
    reference: dict[bool, Reference],
    proteins: list[str],
    dtype: torch.dtype,
    gate: float,
    masked: bool,
) -> None:
    expected, expected_logits = reference[masked]
    model = ESM2(gate_config)
    model.load_state_dict(gate_pair[1].state_dict())
    packed = pack([encode(s) for s in proteins])
    result = ours(model.to(dtype), padded(proteins, masked), packed)
    assert sorted(result.hidden) == list(range(7))
    assert result.logits is not None
    for k, layer in expected.items():
        assert result.hidden[k].dtype == dtype
        # Each protein by itself, so that a long one cannot hide a short one.
        for mine, peers in zip(result.hidden[k].split(packed.lengths), layer.split(packed.lengths), strict=True):
            assert relative(mine, peers) <= gate, f"layer {k}, {len(mine) - 2} residues"
    assert relative(result.logits, expected_logits) <= gate


@pytest.mark.parametrize(
    "config", [ESM2Config(2, 40, 2), ESM2Config(2, 48, 2, token_dropout=False), ESM2Config(1, 128, 1)]
)
def test_other_shapes_and_no_token_dropout(pair: Callable[..., Pair], proteins: list[str], config: ESM2Config) -> None:
    peer, model = pair(config)
    tokens = padded(proteins[:6], masked=True)
    expected, logits = theirs(peer, tokens)
    result = ours(model, tokens, pack([encode(s) for s in proteins[:6]]))
    assert max(relative(result.hidden[k], expected[k]) for k in expected) <= 1e-5
    assert result.logits is not None
    assert relative(result.logits, logits) <= 1e-5


def test_the_frequencies_of_the_weights_are_used_not_new_ones(
    gate_pair: Pair, reference: dict[bool, Reference], proteins: list[str]
) -> None:
    """Published weights carry frequencies rounded to fp16; computed afresh they miss the gate."""
    _, model = gate_pair
    tokens, packed = padded(proteins), pack([encode(s) for s in proteins])
    expected, _ = reference[False]
    kept = model.rotary.inv_freq
    try:
        model.rotary.inv_freq = inverse_frequencies(model.config.head_dim)
        assert relative(ours(model, tokens, packed).hidden[6], expected[6]) > 1e-3
    finally:
        model.rotary.inv_freq = kept


def test_rotary_tables_stay_fp32_in_a_half_model_and_under_autocast() -> None:
    position_T = torch.arange(2048)
    fresh = ESM2(SMALL).rotary(position_T)
    half = ESM2(SMALL).to(torch.bfloat16).half().rotary
    assert half.inv_freq.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        moved = half(position_T)
    for table, reference in zip(moved, fresh, strict=True):
        assert torch.equal(table, reference)
    assert len(torch.unique(fresh[0].squeeze(1), dim=0)) == 2048, "every position has angles of its own"


def test_under_autocast_the_residual_stream_stays_fp32(
    gate_pair: Pair, reference: dict[bool, Reference], proteins: list[str]
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        result = ours(gate_pair[1], padded(proteins), pack([encode(s) for s in proteins]))
    for k, layer in reference[False][0].items():
        assert relative(result.hidden[k], layer) <= 2e-2
    assert result.hidden[3].dtype == torch.float32


def test_gradients_are_fair_esms(pair: Callable[..., Pair], proteins: list[str]) -> None:
    peer, model = pair(SMALL)
    tokens = padded(proteins[:6], masked=True)
    real = tokens != PAD
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(int(real.sum()), 33, generator=generator)
    (peer(tokens)["logits"][real] * weights).sum().backward()
    model.train()
    packed = pack([encode(s) for s in proteins[:6]])
    logits = model(tokens[real], packed.documents, logits=True).logits
    assert logits is not None
    (logits * weights).sum().backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert theirs[name].grad is not None
        # Key biases shift all scores of a row alike, so their true gradient is near zero.
        scale = theirs[name].grad.norm() + 1e-3 * weights.norm()
        assert float((parameter.grad - theirs[name].grad).norm() / scale) < 1e-4, name


def test_a_sequence_is_the_same_alone_and_packed(gate_pair: Pair, proteins: list[str]) -> None:
    _, model = gate_pair
    together = pack([encode(s) for s in proteins])
    packed = model(together.tokens_T, together.documents, layers=range(7), logits=True)
    start = 0
    for sequence in proteins:
        single = pack([encode(sequence)])
        alone = model(single.tokens_T, single.documents, layers=range(7), logits=True)
        end = start + len(sequence) + 2
        for k in range(7):
            assert relative(packed.hidden[k][start:end], alone.hidden[k]) < 2e-6
        assert relative(packed.logits[start:end], alone.logits) < 2e-6
        start = end


def test_padding_of_a_pack_changes_nothing_and_is_finite(gate_pair: Pair, proteins: list[str]) -> None:
    _, model = gate_pair
    encoded = [encode(s) for s in proteins[:5]]
    plain = pack(encoded)
    used = len(plain.tokens_T)
    padded_pack = pack(encoded, num_tokens=used + 300, num_documents=20, max_len=128)
    reference = model(plain.tokens_T, plain.documents, layers=range(7), logits=True)
    result = model(padded_pack.tokens_T, padded_pack.documents, layers=range(7), logits=True)
    for k in range(7):
        assert relative(result.hidden[k][:used], reference.hidden[k]) < 2e-6
        assert result.hidden[k].isfinite().all()
    assert result.logits.isfinite().all()
    assert not result.hidden[0][used:].any()


def test_it_stops_after_the_last_layer_wanted_and_loses_nothing(gate_pair: Pair, proteins: list[str]) -> None:
    _, model = gate_pair
    packed = pack([encode(s) for s in proteins[:6]])
    full = model(packed.tokens_T, packed.documents, layers=range(7), logits=True)
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(model.layers, start=1)
    ]
    try:
        for k in range(7):
            ran.clear()
            early = model(packed.tokens_T, packed.documents, layers=[k])
            assert early.logits is None
            assert list(early.hidden) == [k]
            assert torch.equal(early.hidden[k], full.hidden[k])
            assert ran == list(range(1, k + 1))
    finally:
        for handle in handles:
            handle.remove()


def test_an_identity_splice_changes_no_bit(gate_pair: Pair, proteins: list[str]) -> None:
    _, model = gate_pair
    packed = pack([encode(s) for s in proteins[:6]])
    plain = model(packed.tokens_T, packed.documents, layers=range(7), logits=True)
    for k in range(7):
        spliced = model(packed.tokens_T, packed.documents, layers=range(7), splice={k: lambda x: x}, logits=True)
        assert torch.equal(spliced.logits, plain.logits)
        assert all(torch.equal(spliced.hidden[j], plain.hidden[j]) for j in range(7))


def test_a_splice_changes_the_layers_above_it_alone(gate_pair: Pair, proteins: list[str]) -> None:
    _, model = gate_pair
    packed = pack([encode(s) for s in proteins[:6]])
    plain = model(packed.tokens_T, packed.documents, layers=range(7), logits=True)
    for k in range(7):
        seen = []

        def halve(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x)
            return x * 0.5

        spliced = model(packed.tokens_T, packed.documents, layers=range(7), splice={k: halve}, logits=True)
        assert torch.equal(seen[0], plain.hidden[k]), "the splice is given layer k"
        for j in range(7):
            assert torch.equal(spliced.hidden[j], plain.hidden[j]) == (j <= k), (j, k)
        assert not torch.equal(spliced.logits, plain.logits)


def test_a_pass_goes_on_from_any_layer_as_from_its_splice(gate_pair: Pair, proteins: list[str]) -> None:
    _, model = gate_pair
    packed = pack([encode(s) for s in proteins[:6]])
    for k in range(7):
        below = model.below(packed.tokens_T, packed.documents, k)
        spliced = model(packed.tokens_T, packed.documents, splice={k: torch.sin}, logits=True)
        assert torch.equal(model.head(model.above(below, below.x_TD.sin())), spliced.logits)


def test_a_splice_at_the_last_layer_acts_after_the_final_layer_norm(gate_pair: Pair, proteins: list[str]) -> None:
    _, model = gate_pair
    packed = pack([encode(s) for s in proteins[:6]])
    plain = model(packed.tokens_T, packed.documents, layers=[6])
    spliced = model(packed.tokens_T, packed.documents, splice={6: lambda x: -x}, logits=True)
    assert torch.equal(spliced.logits, model.lm_head(-plain.hidden[6], model.embed_tokens.weight))


def test_layers_that_do_not_exist_are_named() -> None:
    model = ESM2(SMALL)
    packed = pack([encode("MKV")])
    with pytest.raises(ValueError, match="layer 4 asked of a model that has layers 0 to 3"):
        model(packed.tokens_T, packed.documents, layers=[4])
    with pytest.raises(ValueError, match="layer -1"):
        model(packed.tokens_T, packed.documents, splice={-1: lambda x: x}, logits=True)
    with pytest.raises(ValueError, match="nothing asked for"):
        model(packed.tokens_T, packed.documents)
    with pytest.raises(ValueError, match="d 30 with num_heads 4"):
        ESM2Config(2, 30, 4)


def test_published_shapes_have_fair_esms_number_of_parameters() -> None:
    for name, config in PUBLISHED.items():
        assert name.startswith(f"esm2_t{config.num_layers}_")
        with torch.device("meta"):
            peer = esm.model.esm2.ESM2(config.num_layers, config.d, config.num_heads)
            model = ESM2(config)
        count = sum(p.numel() for n, p in peer.named_parameters() if not n.startswith("contact_head"))
        assert config.num_parameters == count == sum(p.numel() for p in model.parameters())


def test_it_traces_as_one_graph(proteins: list[str]) -> None:
    model = ESM2(SMALL)
    packed = pack([encode(s) for s in proteins[:4]], num_tokens=160, num_documents=8, max_len=128)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        traced = compiled(packed.tokens_T, packed.documents, layers=[2], logits=True)
        eager = model(packed.tokens_T, packed.documents, layers=[2], logits=True)
    torch.testing.assert_close(traced.hidden[2], eager.hidden[2])
    torch.testing.assert_close(traced.logits, eager.logits)


def test_initial_weights_are_the_seeds_and_start_near_uniform(proteins: list[str]) -> None:
    config = ESM2Config(num_layers=12, d=64, num_heads=4)
    model, again, other = (ESM2(config) for _ in range(3))
    model.init_weights(3)
    again.to(torch.bfloat16).init_weights(3)
    other.init_weights(4)
    states = model.state_dict(), again.state_dict(), other.state_dict()
    for name, tensor in states[0].items():
        assert torch.equal(tensor.to(states[1][name].dtype), states[1][name]), name
    assert not torch.equal(states[0]["layers.0.fc1.weight"], states[2]["layers.0.fc1.weight"])
    assert not model.embed_tokens.weight[PAD].any()
    packed = pack([encode(s) for s in proteins])
    result = model(packed.tokens_T, packed.documents, layers=[11], logits=True)
    loss = torch.nn.functional.cross_entropy(result.logits, packed.tokens_T.long())
    assert abs(float(loss.detach()) - 3.4965) < 0.1, "ln 33"
    assert 0.1 < float(result.hidden[11].detach().std()) < 3


def test_it_learns(proteins: list[str]) -> None:
    """A protein that is always the same has known residues at its masked places."""
    model = ESM2(ESM2Config(num_layers=2, d=32, num_heads=4))
    model.init_weights(0)
    packed = pack([encode(proteins[1])] * 16)
    draws_T = torch.rand(len(packed.tokens_T), generator=torch.Generator().manual_seed(0))
    masked_T = packed.residue_mask_T & (draws_T < 0.15)
    inputs_T = packed.tokens_T.masked_fill(masked_T, MASK)
    targets = packed.tokens_T[masked_T].long()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(120):
        logits = model(inputs_T, packed.documents, logits=True).logits
        loss = torch.nn.functional.cross_entropy(logits[masked_T], targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 3
    assert losses[-1] < 0.5
