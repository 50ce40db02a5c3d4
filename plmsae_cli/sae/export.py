"""A trained dictionary as plain tensors and settings, and as a model of raw activations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plmsae_cli.sae.architectures import ARCHITECTURES, name_of
from plmsae_cli.sae.dictionary import Dictionary


def fold(model: Dictionary, mean_D: Tensor, scale: float) -> Dictionary:
    """A copy of `model`, trained on (x - mean) * scale, that eats and reconstructs raw activations x.

    Its latents are in raw units (the trained ones divided by `scale`) and its decoder rows keep norm 1:
    b_enc' = b_enc / s, b_dec' = mean + b_dec / s, W_enc and W_dec unchanged.
    """
    folded = copy.deepcopy(model)
    folded.fold_(mean_D.to(folded.b_dec_D), scale)
    return folded


def to_state(model: Dictionary) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name (parameters and `maximum_N`; not copies) and JSON-able settings with `architecture`."""
    return dict(model.state_dict()), {"architecture": name_of(model), **model.settings()}


def from_state(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Dictionary:
    """The model that `to_state` described.

    Raises ValueError where the architecture is unknown or tensors are missing, left over or of another shape.
    """
    settings = dict(config)
    architecture = settings.pop("architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}: one of {', '.join(ARCHITECTURES)}")
    model = ARCHITECTURES[architecture](**settings)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted != found:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ValueError(
            f"the saved {architecture} dictionary does not fit its settings: "
            + "; ".join(f"{name} is {found.get(name, 'absent')}, not {wanted.get(name, 'known')}" for name in differing)
        )
    model.load_state_dict(dict(state))
    return model
