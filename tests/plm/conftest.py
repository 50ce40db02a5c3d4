"""fair-esm's own ESM-2 with random weights beside ours, and real proteins."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import esm
import pytest
import torch

from plmsae_cli.plm.esm2 import ESM2, ESM2Config

INSULIN_B = "FVNQHLCGSHLVEALYLVCGERGFFYTPKT"
UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
LYSOZYME = (
    "KVFGRCELAAAMKRHGLDNYRGYSLGNWVCAAKFESNFNTQATNRNTDGSTDYGILQINSRWWCNDGRTPGSRNLCNIPCSALLSSDITASVNCAKKIVSDGNG"
    "MNAWVAWRNRCKGTDVQAWIRGCRL"
)
GFP = (
    "MSKGEELFTGVVPILVELDGDVNGHKFSVSGEGEGDATYGKLTLKFICTTGKLPVPWPTLVTTFSYGVQCFSRYPDHMKQHDFFKSAMPEGYVQERTIFFKDDG"
    "NYKTRAEVKFEGDTLVNRIELKGIDFKEDGNILGHKLEYNYNSHNVYIMADKQKNGIKVNFKIRHNIEDGSVQLADHYQQNTPIGDGPVLLPDNHYLSTQSALS"
    "KDPNEKRDHMVLLEFVTAAGITHGMDELYK"
)
SHARED = Path(__file__).parents[3] / "shared" / "data" / "uniprot_20k.fasta.gz"

Pair = tuple[torch.nn.Module, ESM2]


def _long_proteins() -> list[str]:
    """One of about 300 residues and one of 1022: UniProt's where it is at hand, else repeats of a real
    one."""
    if not SHARED.exists():
        return [(GFP + LYSOZYME)[:300], (GFP * 5)[:1022]]
    found: dict[int, str] = {}
    with gzip.open(SHARED, "rt") as lines:
        sequence = ""
        for line in lines:
            if not line.startswith(">"):
                sequence += line.strip()
                continue
            if 290 <= len(sequence) <= 310:
                found.setdefault(300, sequence)
            if len(sequence) > 1022:
                found.setdefault(1022, sequence[:1022])
            if len(found) == 2:
                break
            sequence = ""
    return [found[300], found[1022]]


@pytest.fixture(scope="session")
def proteins() -> list[str]:
    """1 to 1022 residues, with every non-standard letter; two neighbours of equal length."""
    return ["M", INSULIN_B, "MKVXBUZO-.AC", UBIQUITIN, UBIQUITIN[::-1], LYSOZYME, *_long_proteins()]


def make_pair(config: ESM2Config, seed: int = 0) -> Pair:
    """fair-esm's module and ours with the same weights: none zero, LayerNorms affine, frequencies as
    published."""
    peer = esm.model.esm2.ESM2(config.num_layers, config.d, config.num_heads, token_dropout=config.token_dropout)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise * 1.5 / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(noise * 0.2 + ("layer_norm" in name and name.endswith("weight")))
        for layer in peer.layers:
            frequencies = layer.self_attn.rot_emb.inv_freq
            frequencies.copy_(frequencies.half().float())
    ours = ESM2(config)
    theirs = peer.state_dict()
    theirs["rotary.inv_freq"] = theirs["layers.0.self_attn.rot_emb.inv_freq"]
    ours.load_state_dict({name: theirs[name] for name in ours.state_dict()})
    return peer.eval(), ours.eval()


@pytest.fixture(scope="session")
def pair() -> Callable[..., Pair]:
    return make_pair


@pytest.fixture(scope="session")
def gate_config() -> ESM2Config:
    return ESM2Config(num_layers=6, d=96, num_heads=6)


@pytest.fixture(scope="session")
def gate_pair(gate_config: ESM2Config) -> Pair:
    return make_pair(gate_config)
