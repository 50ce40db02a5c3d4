"""Small language models of every kind that a training step compiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from plmsae_cli.config.experiment import Train
from plmsae_cli.plm.alphabet import AMINO_ACIDS, encode, wrap
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.training.masking import Masked
from plmsae_cli.training.packs import Packs
from plmsae_cli.training.plm_objective import PLMObjective

UNET = {
    "all": {},
    "window": {"window": 20},
    "plain_values": {"value_embeddings": False},
    "plain_transformer": {"unet": False},
    "p_attention": {"p_attention": True, "num_att_tokens": 24},
    "caps": {"attention_soft_cap": 5.0, "soft_logit_cap": 8.0, "window": 20},
    "no_mask_embedding": {"mask_embedding": False},
    "tied": {"tie_embeddings": True},
    "diffusion": {"objective": "masked_diffusion"},
}
MODELS: dict[str, dict[str, Any]] = {
    "esm2": {"architecture": "esm2"},
    **{name: {"architecture": "unet", "window": None, **options} for name, options in UNET.items()},
}


def objective(device: str, compute: torch.dtype, **plm: Any) -> PLMObjective:
    """A small model as its training starts, with three packs to read."""
    rng = np.random.default_rng(0)
    proteins = ["".join(rng.choice(list(AMINO_ACIDS), rng.integers(20, 50))) for _ in range(30)]
    packs = Packs([np.concatenate([wrap(encode(protein)) for protein in proteins])], 256, 64, 0)
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "max_length": 62, "pack_tokens": 256}
    options = Train.model_validate(
        {
            "kind": "plm",
            "optimizer": "muon",
            "batch_tokens": 256,
            "seed": 1,
            "plm": {"fasta": "none.fasta", **shape, **plm},
        }
    )
    return PLMObjective(options, packs, {}, 3, Gang(), torch.device(device), compute)


def drawn(one: PLMObjective) -> PLMObjective:
    """With weights such that every parameter has a gradient, the same on any device."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in one.model.parameters():
            width = parameter.shape[-1] if parameter.ndim > 1 else 25
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device) / width**0.5)
    return one


def first_pack(one: PLMObjective) -> tuple[Masked, int | None]:
    """Of its training, and how far a token sees."""
    return one._load(0)[0], one._window(0)
