"""An experiment cut down section by section."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plmsae_cli.config.bugfix.layers import layer_map, swept_layers
from plmsae_cli.config.bugfix.sizes import (
    ANNOTATED,
    CAPPED_PLM,
    EVERY,
    MOST_ACTIVE,
    MOST_EXPANSION,
    MOST_OF_SAE,
    NO_ANSWERS,
    PLM_BATCH,
    ROWS,
    SMALL_DATA,
    SMALL_FEATURES,
    SMALL_LM,
    SMALL_PLM,
    SMALL_STEERING,
    SMALL_STRUCTURE,
    SORTED_SHARD,
    STEPS,
)
from plmsae_cli.config.bugfix.swept import cut_saes, cut_sweep
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.language_models import TRAINED, LanguageModels
from plmsae_cli.config.sae import OPTIONS
from plmsae_cli.config.training import CACHE_LIMIT
from plmsae_cli.config.tree import entries

SMOKE_FASTA = "smoke.fasta.gz"


def bugfix(experiment: Experiment, assets: Path) -> Experiment:
    """The experiment as a smoke run on `assets/smoke.fasta.gz` and the bundled model.

    Swept values of a field that is cut are replaced too, distinct where they were. An axis over inputs or
    over a whole section is left out. Cutting twice changes nothing.
    """
    fasta = str(assets / SMOKE_FASTA)
    data = experiment.dump()
    _own_data(data)
    layers = layer_map(data)
    data |= {"root": "runs/bugfix", "data_root": None, "storage": {}, "model": {"weights": "bundled"}, "limits": {}}
    gpus = experiment.launch.gpus
    data["launch"] = {"executor": "local", "gpus": 0 if gpus == 0 else "auto", "ranks": 2, "workers": 2}
    if data["wandb"]["mode"] == "online":
        data["wandb"]["mode"] = "offline"
    if data["embed"] is not None:
        embedded = dict.fromkeys(layers[layer] for layer in data["embed"]["layers"])
        data["embed"] |= {"fasta": fasta, "imported": None, "layers": list(embedded), "max_length": 1022}
        data["embed"] |= {"compute": "auto", "batch_tokens": "auto", "compile": "auto"}
    for path, value in SMALL_DATA.items():
        section, _, field = path.partition(".")
        if data[section] is not None:
            data[section][field] = value
    if data["embed"] is not None and data["embed"].get("layout") == "bucketed":
        data["embed"]["shard"] = SORTED_SHARD
    if data["train"] is not None:
        _cut_train(data["train"], layers, fasta)
    if data["eval"] is not None:
        if experiment.has_dictionary:
            data["eval"]["fidelity"] |= {"proteins": 8, "batch_tokens": "auto"}
        data["eval"] |= dict.fromkeys(ANNOTATED)
        _cut_language_models(data, fasta)
        if data["eval"]["features"] is not None:
            data["eval"]["features"] |= SMALL_FEATURES
            if data["eval"]["features"]["describe"] is not None:
                data["eval"]["features"]["describe"] |= NO_ANSWERS
        if data["eval"]["structure"] is not None:
            _cut_structure(data["eval"]["structure"], fasta)
        if data["eval"]["steering"] is not None:
            data["eval"]["steering"] |= SMALL_STEERING
    if data["sweep"] is not None:
        cut_sweep(data["sweep"], layers, data["train"])
    return Experiment.model_validate(data)


def _cut_structure(structure: dict[str, Any], fasta: str) -> None:
    structure |= {**SMALL_STRUCTURE, "fasta": fasta}
    structure["k"] = sorted({min(k, MOST_ACTIVE) for k in structure["k"]})[-2:]
    if structure["prefixes"]:
        structure["prefixes"] = "groups"


def _cut_language_models(data: dict[str, Any], fasta: str) -> None:
    """Few proteins and the models at hand; without an autoencoder something is left to measure in any case."""
    evaluated, train = data["eval"], data["train"]
    if evaluated["lm"] is None and (train is None or train["kind"] == "plm"):
        evaluated["lm"] = LanguageModels(fasta=fasta).model_dump(mode="json")
    if evaluated["lm"] is not None:
        models = evaluated["lm"]["models"]
        kept = None if models is None else list(dict.fromkeys(m if m == TRAINED else "bundled" for m in models))
        evaluated["lm"] |= {**SMALL_LM, "fasta": fasta, "models": kept}
    evaluated["representations"] = None


def _own_data(data: dict[str, Any]) -> None:
    """Make the dataset here where the experiment names a finished one."""
    train = data["train"]
    if train is None or train["data"] is None:
        return
    train["data"] = None
    train["layer"] = train["layer"] or 0
    embed = data["embed"] or {"fasta": "", "layers": []}
    # Without the dataset's own word for it, every layer that training may ask for has to be embedded.
    data["embed"] = {**embed, "layers": sorted({*embed["layers"], train["layer"], *swept_layers(data)})}
    data["shuffle"] = data["shuffle"] or {}
    data["optimize"] = data["optimize"] or {}


def _cut_train(train: dict[str, Any], layers: Mapping[int, int], fasta: str) -> None:
    is_plm = train["kind"] == "plm"
    batch = PLM_BATCH if is_plm else ROWS
    train |= {"tokens": STEPS * batch, "batch_tokens": batch, "compute": "auto", "kernels": "auto", **EVERY}
    train |= {"loader": "blocks", "cache": None, "cache_limit": CACHE_LIMIT}
    train["imported"] = None  # it is as wide as the real model: a small one is trained in its stead
    if train["layer"] is not None:
        train["layer"] = layers[train["layer"]]
    for field, most in (("lr_warmup_steps", STEPS // 4), ("dead_tokens", 2 * batch)):
        if train[field] != "auto":
            train[field] = min(train[field], most)
    if is_plm:
        valid = dict.fromkeys(train["plm"]["valid"], fasta)
        train["plm"] |= {**SMALL_PLM, "fasta": fasta, "bin": None, "valid": valid}
        for field, most in CAPPED_PLM.items():
            value = train["plm"][field]
            if value is not None and value != entries()[f"train.plm.{field}"].default:
                train["plm"][field] = min(value, most)
        return
    sae = train["sae"] or {}
    expansion = min(sae.get("expansion") or MOST_EXPANSION, MOST_EXPANSION)
    sae |= {"expansion": expansion, "num_latents": None}
    if "k" in OPTIONS[sae.get("architecture", "topk")]:
        sae["k"] = min(sae.get("k", MOST_ACTIVE), MOST_ACTIVE)
    for field, most in MOST_OF_SAE.items():
        if sae.get(field) is not None:
            sae[field] = min(sae[field], most)
    train["sae"] = sae
    if train["saes"] is not None:
        train["saes"] = cut_saes(train["saes"])
