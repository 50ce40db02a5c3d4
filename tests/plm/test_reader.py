"""The reader against `ESM2.forward` and fair-esm: eager and compiled, every layer, one compilation for all packs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plmsae_cli.plm.alphabet import MASK, Packed, encode, pack
from plmsae_cli.plm.cost import forward_flops, matrix_flops
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.plm.reader import Reader

Pair = tuple[torch.nn.Module, ESM2]
GATES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@torch.no_grad()
def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def copy_of(model: ESM2, dtype: torch.dtype = torch.float32) -> ESM2:
    copy = ESM2(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(dtype).eval()


@torch.no_grad()
def forward(model: ESM2, packed: Packed) -> dict[int, Tensor]:
    layers = range(model.config.num_layers + 1)
    return model(packed.tokens_T, packed.documents, layers=layers).hidden  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", GATES)
def test_every_layer_is_that_of_the_model(gate_pair: Pair, proteins: list[str], dtype: torch.dtype) -> None:
    packed = pack([encode(s) for s in proteins], num_documents=40, num_tokens=2048, max_len=1024)
    packed.tokens_T[40:60] = MASK
    expected = forward(gate_pair[1], packed)
    reader = Reader(copy_of(gate_pair[1], dtype))
    found = dict(reader.layers(packed.tokens_T, packed.documents, range(7)))
    assert list(found) == list(range(7))
    for k, x_TD in found.items():
        assert x_TD.dtype == dtype
        assert relative(x_TD, expected[k]) <= GATES[dtype]
        if dtype is torch.float32:
            assert relative(x_TD, expected[k]) < 1e-6


def test_it_shares_the_models_parameters(gate_pair: Pair, proteins: list[str]) -> None:
    """Afterwards the model is the same, and what changes one changes the other."""
    model = copy_of(gate_pair[1])
    packed = pack([encode(s) for s in proteins[:4]])
    before = forward(model, packed)
    reader = Reader(model)
    after = forward(model, packed)
    assert all(torch.equal(before[k], after[k]) for k in before)
    with torch.no_grad():
        for block in model.layers:
            block.self_attn.k_proj.weight.mul_(2)
            block.fc1.bias.add_(1)
    changed = forward(model, packed)
    assert relative(changed[6], before[6]) > 1e-2
    assert relative(dict(reader.layers(packed.tokens_T, packed.documents, [6]))[6], changed[6]) < 1e-6


def test_blocks_above_the_deepest_layer_are_not_run(gate_pair: Pair, proteins: list[str]) -> None:
    """With them spoilt, the layers below are what they were."""
    packed = pack([encode(s) for s in proteins[:4]])
    whole = forward(gate_pair[1], packed)
    for deepest in range(6):
        model = copy_of(gate_pair[1])
        with torch.no_grad():
            for parameter in model.layers[deepest:].parameters():
                parameter.fill_(torch.nan)
        found = dict(Reader(model).layers(packed.tokens_T, packed.documents, {0, deepest}))
        assert sorted(found) == sorted({0, deepest})
        assert relative(found[deepest], whole[deepest]) < 1e-6


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("any_length", [False, True])
def test_one_compilation_serves_all_blocks_and_packs(gate_pair: Pair, proteins: list[str], any_length: bool) -> None:
    model = copy_of(gate_pair[1])
    reader = Reader(model)
    sizes = (2048, 2048, 1792, 2304) if any_length else (2048, 2048)
    for turn, num_tokens in enumerate(sizes):
        chosen = proteins[turn:]
        packed = pack([encode(s) for s in chosen], num_tokens=num_tokens, num_documents=16 + turn)
        expected = forward(model, packed)
        with torch.compiler.set_stance("default" if turn == 0 else "fail_on_recompile"):
            found = dict(
                reader.layers(packed.tokens_T, packed.documents, range(7), compiled=True, any_length=any_length)
            )
        assert max(relative(found[k], expected[k]) for k in range(7)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("any_length", [False, True])
def test_what_the_compiler_makes_is_within_the_gates(gate_pair: Pair, proteins: list[str], any_length: bool) -> None:
    packed = pack([encode(s) for s in proteins], num_tokens=2048, max_len=1024)
    expected = forward(gate_pair[1], packed)
    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()
        reader = Reader(copy_of(gate_pair[1], dtype))
        found = reader.layers(packed.tokens_T, packed.documents, range(7), compiled=True, any_length=any_length)
        assert max(relative(x_TD, expected[k]) for k, x_TD in found) <= GATES[dtype]


def test_layers_that_do_not_exist_are_named() -> None:
    reader, packed = Reader(ESM2(ESM2Config(2, 32, 4))), pack([encode("MKV")])
    for wanted in ([3], [-1, 2], []):
        with pytest.raises(ValueError, match="layers 0 to 2"):
            next(reader.layers(packed.tokens_T, packed.documents, wanted))


def test_operations_are_those_torch_counts(proteins: list[str]) -> None:
    """torch's own counter over a forward pass without the head, attention written out."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = ESM2Config(3, 64, 4)
    model, lengths = ESM2(config).eval(), [len(s) + 2 for s in proteins]
    packed = pack([encode(s) for s in proteins])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(model, packed)
    expected = forward_flops(config, 3, sum(lengths), sum(n * n for n in lengths))
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
    blocks = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    assert matrix_flops(config, 3) == 2 * blocks
