"""Our ESM-2 in the names of transformers' `EsmForMaskedLM`; `store/weight_names.py` is the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from plmsae_cli.plm.alphabet import MASK, PAD

_BLOCK = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "LayerNorm",
}


def esm_state(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors under transformers' names. The output weight is the embedding's and not stored twice; a contact head of
    zeros stands where one is expected."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        place, _, kind = name.rpartition(".")
        if place == "rotary":  # of the model, as transformers 5 has them; 4 had a copy in each layer, and computes them
            found["esm.rotary_embeddings.inv_freq"] = tensor
        elif place.startswith("layers."):
            _, number, part = place.split(".", 2)
            found[f"esm.encoder.layer.{number}.{_BLOCK[part]}.{kind}"] = tensor
        elif place == "embed_tokens":
            found["esm.embeddings.word_embeddings.weight"] = tensor
        elif place == "emb_layer_norm_after":
            found[f"esm.encoder.{place}.{kind}"] = tensor
        else:
            found[name] = tensor  # the head
    heads = int(config["num_layers"]) * int(config["num_heads"])
    found["esm.contact_head.regression.weight"] = torch.zeros(1, heads)
    found["esm.contact_head.regression.bias"] = torch.zeros(1)
    return found


def esm_config(config: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """config.json; `longest`: tokens of the longest sequence trained on."""
    return {
        "architectures": ["EsmForMaskedLM"],
        "model_type": "esm",
        "vocab_size": config["vocab"],
        "mask_token_id": MASK,
        "pad_token_id": PAD,
        "hidden_size": config["d"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_heads"],
        "intermediate_size": 4 * config["d"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": None,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": longest,
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": False,
        "token_dropout": config["token_dropout"],
        "is_folding_model": False,
        "tie_word_embeddings": True,
        "use_cache": False,
        "dtype": "float32",
    }
