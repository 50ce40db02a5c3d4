"""The architectures by the name that configurations and saved dictionaries use."""

from __future__ import annotations

from plmsae_cli.sae.batch_topk import BatchTopK
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.gated import Gated
from plmsae_cli.sae.jumprelu import JumpReLU
from plmsae_cli.sae.matryoshka import MatryoshkaBatchTopK, MatryoshkaTopK
from plmsae_cli.sae.multi_topk import MultiTopK
from plmsae_cli.sae.relu_l1 import ReLUL1
from plmsae_cli.sae.switch import Switch
from plmsae_cli.sae.topk import TopK

ARCHITECTURES: dict[str, type[Dictionary]] = {
    "topk": TopK,
    "multi_topk": MultiTopK,
    "matryoshka_topk": MatryoshkaTopK,
    "batch_topk": BatchTopK,
    "matryoshka_batch_topk": MatryoshkaBatchTopK,
    "jumprelu": JumpReLU,
    "gated": Gated,
    "relu_l1": ReLUL1,
    "switch": Switch,
}


def name_of(model: Dictionary) -> str:
    """The name of `model`'s architecture."""
    return next(name for name, kind in ARCHITECTURES.items() if kind is type(model))
