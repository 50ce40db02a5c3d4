"""The architectures by the name that configurations and saved dictionaries use."""

from __future__ import annotations

from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.matryoshka import MatryoshkaTopK
from plmsae_cli.sae.topk import TopK

ARCHITECTURES: dict[str, type[Dictionary]] = {"topk": TopK, "matryoshka_topk": MatryoshkaTopK}


def name_of(model: Dictionary) -> str:
    """The name of `model`'s architecture."""
    return next(name for name, kind in ARCHITECTURES.items() if kind is type(model))
