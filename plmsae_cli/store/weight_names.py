"""Names and shapes of an ESM-2 state: other layouts to ours, and the check that nothing is missing.

Ours are fair-esm's module names, with two differences: the rotary frequencies, the same in every layer, stand
once as `rotary.inv_freq`, and the language-model head has no weight of its own, as it is the embedding's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from plmsae_cli.config.errors import UserError

State = dict[str, torch.Tensor]

# Applied in this order: a later rule sees what an earlier one made.
_HUGGING_FACE = (
    (r"^esm\.", ""),
    # transformers 5 writes these LayerNorms under the names they had in TensorFlow.
    (r"\.LayerNorm\.gamma$", ".LayerNorm.weight"),
    (r"\.LayerNorm\.beta$", ".LayerNorm.bias"),
    (r"^embeddings\.word_embeddings\.", "embed_tokens."),
    (r"^encoder\.emb_layer_norm_after\.", "emb_layer_norm_after."),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.self\.rotary_embeddings\.", ".self_attn.rot_emb."),
    (r"\.attention\.self\.(query|key|value)\.", lambda match: f".self_attn.{match[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".self_attn.out_proj."),
    (r"\.attention\.LayerNorm\.", ".self_attn_layer_norm."),
    (r"\.intermediate\.dense\.", ".fc1."),
    (r"\.output\.dense\.", ".fc2."),
    (r"(layers\.\d+)\.LayerNorm\.", r"\1.final_layer_norm."),
    (r"^lm_head\.decoder\.weight$", "lm_head.weight"),
)
# Of no effect on representations or logits: the contact head, the pooler of untrained exports, counters, and
# the position table and decoder bias (a copy of `lm_head.bias`) that some exports carry.
_UNUSED = re.compile(
    r"^(contact_head\.|pooler\.|embeddings\.position_ids$|embeddings\.position_embeddings\.|lm_head\.decoder\.bias$)"
)


def from_fair_esm(state: Mapping[str, torch.Tensor], where: str) -> State:
    """A published checkpoint's `model`, or a fair-esm module's state dict."""
    return _common({re.sub(r"^encoder\.(sentence_encoder\.)?", "", name): t for name, t in state.items()}, where)


def from_hugging_face(state: Mapping[str, torch.Tensor], where: str) -> State:
    """The state of transformers' EsmForMaskedLM."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in _HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return _common(renamed, where)


def _common(state: State, where: str) -> State:
    """fair-esm's names to ours."""
    own = {name: tensor for name, tensor in state.items() if not _UNUSED.match(name)}
    frequencies = [own.pop(name) for name in list(own) if name.endswith(".inv_freq")]
    if frequencies:
        # As stored, not computed afresh: training in fp16 rounded them, and the model has learned with that.
        own["rotary.inv_freq"] = frequencies[0].float()
        if any(not torch.equal(other, frequencies[0]) for other in frequencies):
            raise UserError(f"{where}: the rotary frequencies differ between layers, which ESM-2's do not")
    head = own.pop("lm_head.weight", None)
    embedding = own.get("embed_tokens.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise UserError(f"{where}: the output weight of the language-model head is not the embedding's, as in ESM-2")
    return own


def state_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model of this configuration."""
    d, vocab = int(config["d"]), int(config["vocab"])

    def affine(name: str, *weight: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}

    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (vocab, d),
        "rotary.inv_freq": (d // int(config["num_heads"]) // 2,),
        "lm_head.bias": (vocab,),
        **affine("lm_head.dense", d, d),
        **affine("lm_head.layer_norm", d),
        **affine("emb_layer_norm_after", d),
    }
    for layer in range(int(config["num_layers"])):
        block = f"layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= affine(f"{block}.self_attn.{name}", d, d)
        shapes |= affine(f"{block}.self_attn_layer_norm", d) | affine(f"{block}.final_layer_norm", d)
        shapes |= affine(f"{block}.fc1", 4 * d, d) | affine(f"{block}.fc2", d, 4 * d)
    return shapes


def check_state(state: Mapping[str, torch.Tensor], config: Mapping[str, Any], where: str) -> None:
    """Raise a UserError unless `state` is that of a model of this configuration; frequencies may be
    absent. A UNet's tensors are checked by the model that takes them."""
    if config.get("architecture") == "unet":
        return
    try:
        shapes = state_shapes(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: the configuration {dict(config)} is not that of an ESM-2 model: {error}") from error
    missing = [name for name in shapes if name not in state and name != "rotary.inv_freq"]
    extra = [name for name in state if name not in shapes]
    wrong = [
        f"{name} is {tuple(state[name].shape)}, not {shape}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    problems = {"missing": missing, "not of this model": extra, "of another shape": wrong}
    found = [f"{label}: {_some(names)}" for label, names in problems.items() if names]
    if found:
        raise UserError(
            f"{where} does not fit {config['num_layers']} layers of d {config['d']}. {'. '.join(found)}",
            hint="the weights are of another model, or its configuration was changed",
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
