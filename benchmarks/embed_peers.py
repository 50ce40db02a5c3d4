"""The peers' forward passes and the numerics gate for `embed.py`: fair-esm and transformers with random weights."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from plmsae_cli.plm.alphabet import PAD, encode, pack, wrap
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.plm.reader import Reader

try:
    import esm

    ALPHABET: Any = esm.data.Alphabet.from_architecture("ESM-1b")
except ImportError:
    esm = ALPHABET = None
GATES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def padded(sequences: Sequence[str], budget: int, most: int) -> Iterator[tuple[Tensor, int]]:
    """Sorted batches of at most `budget` padded tokens, `most` of them spread over all lengths, and their residues."""
    batches: list[list[str]] = [[]]
    for sequence in sorted(sequences, key=len):
        if batches[-1] and (len(sequence) + 2) * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(sequence)
    for batch in batches[:: max(1, len(batches) // most)]:
        tokens = [torch.from_numpy(wrap(encode(sequence)).astype("int64")) for sequence in batch]
        yield torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=PAD), sum(map(len, batch))


@torch.inference_mode()
def rate(
    forward: Callable[[Tensor], Any], sequences: Sequence[str], budget: int, most: int, device: torch.device
) -> float:
    """Residues a second; tokenised before the clock starts."""
    batches = [(tokens.to(device), residues) for tokens, residues in padded(sequences, budget, most)]
    for tokens, _ in (batches[len(batches) // 2], batches[-1]):
        forward(tokens)
    wait(device)
    begun = time.perf_counter()
    for tokens, _ in batches:
        forward(tokens)
    wait(device)
    return sum(residues for _, residues in batches) / (time.perf_counter() - begun)


def fair_esm(config: ESM2Config, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    with device:
        model = esm.model.esm2.ESM2(config.num_layers, config.d, config.num_heads, ALPHABET)
    return model.eval()  # type: ignore[no-any-return]


def transformers_esm(config: ESM2Config, device: torch.device) -> torch.nn.Module:
    """transformers' EsmModel with SDPA; raises ImportError where it is not installed."""
    try:
        import torchvision  # noqa: F401
    except Exception:
        # Built for another torch it does not import, and transformers, which finds it there, fails with it.
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    from transformers import EsmConfig, EsmModel

    about = EsmConfig(
        vocab_size=33,
        hidden_size=config.d,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=4 * config.d,
        position_embedding_type="rotary",
        max_position_embeddings=1026,
        pad_token_id=1,
        mask_token_id=32,
        token_dropout=True,
        emb_layer_norm_before=False,
        attn_implementation="sdpa",
    )
    with device:
        model = EsmModel(about, add_pooling_layer=False)
    return model.eval()


def own(config: ESM2Config, device: torch.device) -> torch.nn.Module:
    """Our plain forward pass, for the gate where fair-esm is not installed."""
    torch.manual_seed(0)
    with device:
        return ESM2(config).eval()


def hidden(peer: torch.nn.Module, sequence: str, layers: range, device: torch.device) -> dict[int, Tensor]:
    """Every layer of one protein, by the reference."""
    if isinstance(peer, ESM2):
        packed = pack([encode(sequence)]).to(device)
        return dict(peer(packed.tokens_T, packed.documents, layers=layers).hidden)
    _, _, tokens = ALPHABET.get_batch_converter()([("", sequence)])
    found = peer(tokens.to(device), repr_layers=layers)["representations"]
    return {k: found[k][0] for k in layers}


def ours_from(peer: torch.nn.Module, config: ESM2Config, dtype: torch.dtype, device: torch.device) -> ESM2:
    """Our model with the reference's weights."""
    with torch.device("meta"):
        model = ESM2(config)
    state = {name: tensor.to(dtype, copy=True) for name, tensor in peer.state_dict().items()}
    layers: Any = peer.layers
    frequencies = peer.rotary.inv_freq if isinstance(peer, ESM2) else layers[0].self_attn.rot_emb.inv_freq
    state["rotary.inv_freq"] = frequencies.detach().clone()
    model.load_state_dict({name: state[name] for name in model.state_dict()}, assign=True)
    return model.to(device).eval()


@torch.no_grad()
def errors(
    peer: torch.nn.Module, config: ESM2Config, sequences: Sequence[str], compiled: bool, device: torch.device
) -> dict[torch.dtype, list[float]]:
    """dtype -> relative L2 of every layer against fair-esm in float32, worst protein; in packs of constant shape."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # the reference and the float32 gate are no place for TF32
    layers = range(config.num_layers + 1)
    reference: dict[int, list[Tensor]] = {k: [] for k in layers}
    for sequence in sequences:
        for k, x_LD in hidden(peer, sequence, layers, device).items():
            reference[k].append(x_LD.float())
    used = sum(len(s) + 2 for s in sequences)
    max_len = max(len(s) + 2 for s in sequences)
    packed = pack(
        [encode(s) for s in sequences],
        num_tokens=-(-used // 128) * 128 + 128,
        num_documents=len(sequences) + 8,
        max_len=max_len,
    ).to(device)
    lengths = [len(s) + 2 for s in sequences]
    worst: dict[torch.dtype, list[float]] = {}
    for dtype in GATES:
        reader = Reader(ours_from(peer, config, dtype, device))
        shares = []
        for k, x_TD in reader.layers(packed.tokens_T, packed.documents, layers, compiled=compiled, any_length=compiled):
            mine = x_TD[:used].float().split(lengths)
            pairs = zip(mine, reference[k], strict=True)
            shares.append(max(float((a - b).norm() / b.norm()) for a, b in pairs))
        worst[dtype] = shares
        del reader
    torch.set_float32_matmul_precision(before)
    assert (packed.tokens_T[used:] == PAD).all()
    return worst
