"""Our UNet in the names of `modeling_plmsae_unet.py`, which are ours below `model.`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from plmsae_cli.plm.alphabet import CLS, EOS, MASK, PAD
from plmsae_cli.plm.unet_config import UNetConfig

MODELING = "modeling_plmsae_unet.py"


def unet_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the model's names; a tied output weight is the embedding's and not there at all."""
    return {name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in state.items()}


def unet_config(config: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """config.json; `longest`: tokens of the longest sequence trained on."""
    shape = UNetConfig(**config)
    place = MODELING.removesuffix(".py")
    return {
        "architectures": ["PlmsaeUNetForMaskedLM"],
        "model_type": "plmsae_unet",
        "auto_map": {
            "AutoConfig": f"{place}.PlmsaeUNetConfig",
            "AutoModel": f"{place}.PlmsaeUNetModel",
            "AutoModelForMaskedLM": f"{place}.PlmsaeUNetForMaskedLM",
        },
        "vocab_size": shape.vocab,
        "hidden_size": shape.d,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": shape.hidden,
        "soft_logit_cap": shape.soft_logit_cap,
        "attention_soft_cap": shape.attention_soft_cap,
        "unet": shape.unet,
        "value_embeddings": shape.mixes_values,
        "num_att_tokens": shape.num_att_tokens,
        "mask_embedding": shape.mask_embedding,
        # The tied weight is one tensor in the model's own code, so transformers has nothing to tie.
        "tied_output": shape.tie_embeddings,
        "tie_word_embeddings": False,
        "max_position_embeddings": longest,
        "cls_token_id": CLS,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "mask_token_id": MASK,
        "dtype": "float32",
    }
