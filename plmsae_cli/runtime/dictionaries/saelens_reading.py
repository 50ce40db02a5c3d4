"""Folders of SAELens (https://github.com/decoderesearch/SAELens), versions 2 to 6: cfg.json and sae_weights.safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plmsae_cli.config.errors import UserError
from plmsae_cli.runtime.dictionaries.matrices import Matrices
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.store.foreign import SAELENS

LAYER = "plmsae_layer"
"""Our layer, in the metadata of folders that we write."""
KINDS = ("standard", "topk", "jumprelu", "gated")
_TENSORS = {
    "standard": {"b_enc"},
    "topk": {"b_enc"},
    "jumprelu": {"b_enc", "threshold"},
    "gated": {"b_gate", "r_mag", "b_mag"},
}


def from_saelens(config: Mapping[str, Any], state: Mapping[str, Tensor], normalised: bool) -> Dictionary:
    """The model of activations as SAELens' `encode` takes them.

    Args:
        normalised: whether the caller knows, and takes account of, the factor of `expected_average_only_in`.

    Raises:
        UserError: an architecture or a normalisation that is not read.
    """
    kind, k = _kind(config)
    _require_plain_input(config, normalised)
    state = dict(state)
    scaling = state.pop("scaling_factor", state.pop("finetuning_scaling_factor", None))
    if scaling is not None and not bool((scaling == 1).all()):
        raise UserError("its finetuning_scaling_factor is not supported", "fold it into the decoder first")
    wanted = {"W_enc", "W_dec", "b_dec", *_TENSORS[kind]}
    if wanted != set(state):
        raise UserError(
            f"a {kind} dictionary has the tensors {', '.join(sorted(wanted))}, this one {', '.join(sorted(state))}"
        )
    said = [config.get(name, size) for name, size in zip(("d_in", "d_sae"), state["W_enc"].shape, strict=True)]
    if said != list(state["W_enc"].shape):
        raise UserError(
            f"{SAELENS[0]} says d_in {said[0]} and d_sae {said[1]}, W_enc is {tuple(state['W_enc'].shape)}",
            "the two files are of different dictionaries: copy both again",
        )
    bias = state["b_gate" if kind == "gated" else "b_enc"]
    centred = bool(config.get("apply_b_dec_to_input", True))
    weights = Matrices(state["W_enc"].T, bias, state["W_dec"], state["b_dec"], centred)
    if kind == "topk":
        if not isinstance(k, int):
            raise UserError(f"{SAELENS[0]} does not say k")
        return weights.top_k(k, by_length=bool(config.get("rescale_acts_by_decoder_norm", False)))
    if kind == "jumprelu":
        return weights.jump_relu(state["threshold"])
    if kind == "gated":
        return weights.gated(state["r_mag"], state["b_mag"])
    return weights.relu()


def provenance(config: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """Language model and layer, as we count, where the configuration tells."""
    metadata = config.get("metadata")
    said = {**config, **(metadata if isinstance(metadata, dict) else {})}
    name = said["model_name"] if isinstance(said.get("model_name"), str) else None
    hook = str(said.get("hook_name") or said.get("hook_point") or "")
    if isinstance(said.get(LAYER), int):
        return name, said[LAYER]
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook)
    if found:
        return name, int(found[1]) + (found[2] == "post")
    found = re.search(r"(?:^|\.)encoder\.layer\.(\d+)$", hook)  # of transformers: what block k, from 0, puts out
    return name, int(found[1]) + 1 if found else None


def _kind(config: Mapping[str, Any]) -> tuple[str, Any]:
    kind, k = config.get("architecture", "standard"), config.get("k")
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))  # of versions before 6
    if kind == "standard" and function == "topk":
        options = config.get("activation_fn_kwargs")
        kind, k = "topk", options.get("k") if isinstance(options, dict) else None
    elif function not in ("relu", "topk"):
        raise UserError(f"its activation function {function} is not supported", "relu and topk are")
    if kind not in KINDS:
        raise UserError(f"SAELens' architecture {kind} is not supported", f"those read are {', '.join(KINDS)}")
    return kind, k


def _require_plain_input(config: Mapping[str, Any], normalised: bool) -> None:
    way = config.get("normalize_activations") or "none"
    if way is True:  # of the first versions
        way = "expected_average_only_in"
    if way == "expected_average_only_in" and not normalised:
        raise UserError(
            "it was trained on activations times a factor that SAELens does not store (expected_average_only_in)",
            "say 1 / that factor as train.imported.norm_factor; 1 if it was folded into the weights",
        )
    if way not in ("none", "expected_average_only_in"):
        raise UserError(
            f"its normalize_activations: {way} changes every residue by itself, which is not supported",
            "dictionaries of activations as they are, or times one factor, can be read",
        )
    if config.get("reshape_activations", "none") != "none":
        raise UserError(f"its reshape_activations: {config['reshape_activations']} is not supported")
