"""What the files of other projects' dictionaries say of themselves, and one function that reads them all.

Nothing of a file is run: safetensors, or torch's restricted unpickler with the classes that the format needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.imported import ImportedSAE
from plmsae_cli.runtime.dictionaries.learning import from_tensors
from plmsae_cli.runtime.dictionaries.saelens_reading import from_saelens, provenance
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.store.foreign import SAELENS, files_of
from plmsae_cli.store.fs import Store
from plmsae_cli.store.pickles import read_pickle
from plmsae_cli.store.tensorfile import TensorFile

_TRAINERS = "dictionary_learning.trainers"
# What a checkpoint of SAEFold names beside its tensors: the classes of its trainer, and OmegaConf's list of fractions.
_SAEFOLD = (
    f"{_TRAINERS}.standard.StandardTrainer",
    f"{_TRAINERS}.top_k.TopKTrainer",
    f"{_TRAINERS}.top_k.AutoEncoderTopK",
    f"{_TRAINERS}.matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer",
    f"{_TRAINERS}.matryoshka_batch_top_k.MatryoshkaBatchTopKSAE",
    "dictionary_learning.dictionary.AutoEncoder",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "typing.Any",
    "collections.defaultdict",
    "builtins.dict",
    "builtins.list",
)
_SELECTIONS = {"AutoEncoderTopK": "topk", "BatchTopKSAE": "batch_topk"}


@dataclass(frozen=True)
class Foreign:
    """A dictionary of another project, and what is known of it."""

    model: Dictionary
    """Takes raw activations."""
    format: str
    weights: str | None
    """The language model, as the file or the user names it."""
    layer: int | None
    """As we count."""


def read_dictionary(options: ImportedSAE, store: Store | None = None) -> Foreign:
    """Read what `options.path` names, as it says.

    Raises:
        UserError: there is none, it is damaged or holds more than data, or its kind is not supported.
    """
    store = store or Store()
    files = files_of(options.path, store)
    try:
        model, kind, weights, layer = _read(options, files, store)
    except UserError as error:
        if options.path in error.message:
            raise
        raise UserError(f"{options.path}: {error.message}", error.hint) from error
    except ValueError as error:  # k beyond the dictionary, empty groups
        raise UserError(f"{options.path}: {error}") from error
    if options.norm_factor is not None:
        model.fold_(torch.zeros(model.d), 1 / options.norm_factor)
    own = options.weights or weights, options.layer if options.layer is not None else layer
    return Foreign(model.eval(), kind, *own)


def _read(options: ImportedSAE, files: list[str], store: Store) -> tuple[Dictionary, str, str | None, int | None]:
    if files[0].endswith(SAELENS[1]):
        config = _json(files[1], store)
        held = TensorFile(store, files[0])
        model = from_saelens(config, {n: held.read(n) for n in held.names()}, options.norm_factor is not None)
        return model, "SAELens", *provenance(config)
    if files[0].endswith(".ckpt"):
        return _saefold(options, files[0], store)
    state = _tensors(read_pickle(store.local(files[0]), []))
    said = _settings(files[1:], store)
    kind = "InterPLM" if "normalize_to_sqrt_d" in state or "interplm" in said else "dictionary_learning"
    model = from_tensors(state, options.selection or said.get("selection"), said.get("k"))
    return model, kind, said.get("weights"), said.get("layer")


def _saefold(options: ImportedSAE, path: str, store: Store) -> tuple[Dictionary, str, str | None, int | None]:
    """A checkpoint of Lightning, whose biases are in units of the normalised activations; or its state dict alone."""
    held = read_pickle(store.local(path), [], _SAEFOLD)
    if options.norm_factor is None:
        raise UserError(
            "its biases are in units of the activations divided by norm_factor, which is not in the file",
            "add train.imported.norm_factor; 1 if activations were not divided",
        )
    said: dict[str, Any] = {}
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict):
        said = _of_trainer(_section(_section(held, "hyper_parameters"), "sae_trainer_cfg"))
        held = {n.removeprefix("ae."): t for n, t in held["state_dict"].items() if str(n).startswith("ae.")}
    # SAEFold trains no other dictionary whose tensors leave the selection open.
    model = from_tensors(_tensors(held), options.selection or "topk", said.get("k"))
    return model, "SAEFold", said.get("weights"), said.get("layer")


def _tensors(held: Any) -> dict[str, Tensor]:
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise UserError("it is not a state dict: tensors by name")
    return dict(held)


def _settings(files: list[str], store: Store) -> dict[str, Any]:
    """What config.json (dictionary_learning) or config.yaml (InterPLM) tells: `selection`, `k`, `weights`, `layer`."""
    found: dict[str, Any] = {}
    for path in files:
        if PurePosixPath(path).suffix == ".json":
            trainer = _section(_json(path, store), "trainer")
            found |= _of_trainer(trainer)
            chosen = _SELECTIONS.get(str(trainer.get("dict_class")))
        else:
            # Its own reader runs the tags of this YAML; the one of the trainer is all that is needed, as text.
            text = store.read(path).decode("utf-8", "replace")
            found["interplm"] = True
            tag = re.search(r"^trainer_cfg:.*?interplm\.train\.trainers\.(\w+)", text, re.MULTILINE)
            chosen = {"top_k": "topk", "batch_top_k": "batch_topk"}.get(tag[1]) if tag else None
        if chosen is not None:
            found["selection"] = chosen
    return found


def _of_trainer(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings of a trainer of dictionary_learning tell, as far as it has the type that it should."""
    names = {"k": ("k", int), "weights": ("lm_name", str), "layer": ("layer", int)}
    return {ours: trainer[theirs] for ours, (theirs, kind) in names.items() if type(trainer.get(theirs)) is kind}


def _section(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A mapping inside a mapping, empty where there is none."""
    found = body.get(name)
    return found if isinstance(found, dict) else {}


def _json(path: str, store: Store) -> dict[str, Any]:
    try:
        body = json.loads(store.read(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}", "fetch it again") from error
    if not isinstance(body, dict):
        raise UserError(f"{path} is not a JSON object", "fetch it again")
    return body
