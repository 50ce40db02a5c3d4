"""`--bugfix`: the same experiment cut to a smoke run of seconds, with nothing remote and nothing large.

What is kept is the shape: which stages run, the architecture, the policies, the number of layers, the axes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.language_models import TRAINED, LanguageModels
from plmsae_cli.config.sae import OPTIONS
from plmsae_cli.config.training import CACHE_LIMIT
from plmsae_cli.config.tree import entries

SMOKE_FASTA = "smoke.fasta.gz"
STEPS = 8


def _bundled_layers() -> int:
    config = files("plmsae_cli") / "data" / "bundled" / "config.json"
    if not config.is_file():
        return 6
    return int(json.loads(config.read_text(encoding="utf-8"))["config"]["num_layers"])


BUNDLED_LAYERS = _bundled_layers()

_ROWS = 256  # rows of a batch and of a block
_PACK = 512
_PLM_BATCH = 2 * _PACK  # one pack for each of the two ranks
_WIDEST = 1024
_MOST_ACTIVE = 8
_MOST_EXPANSION = 4.0
_MOST_EXPERTS = 4

_SMALL_PLM = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "max_length": 128,
    "pack_tokens": _PACK,
    "eval_every": STEPS // 2,
    "eval_tokens": 2048,
}
# Of a language model too, where they are larger: the same schedules within a few steps.
_CAPPED_PLM = {
    "num_att_tokens": 16,
    "window": 32,
    "mask_rate_steps": STEPS // 2,
    "diffusion_warmup_steps": STEPS // 2,
    "muon_momentum_warmup_steps": STEPS // 2,
    "cooldown_steps": STEPS // 4,
}
_SMALL_DATA = {
    "shuffle.memory": 8_000_000,
    "optimize.chunk": 1_000_000,
    "optimize.block_rows": _ROWS,
    "embed.shard": 1_000_000,
}
_SORTED_SHARD = 500_000  # of every layer of the bundled model, within shuffle.memory
# Axes that need annotated proteins or structures, of which the package has none.
_ANNOTATED = ("concepts", "families", "probes", "encode", "contacts")
_SMALL_LM = {"bin": None, "sequences": 16, "max_length": 128, "compute": "auto", "batch_tokens": 1024}
# Latents and positions of another dictionary may not exist in the small one.
_SMALL_STEERING = {
    "latents": "densest",
    "top": 2,
    "residues": "all",
    "fasta": None,
    "proteins": 4,
    "esmfold": None,
    "recycles": None,
    "compute": "auto",
    "batch_tokens": "auto",
}
# Structures and ids are those of other proteins; the folding head of the smoke run is small and random.
_SMALL_STRUCTURE: dict[str, Any] = {
    "structures": [],
    "references": None,
    "ids": None,
    "proteins": 2,
    "max_length": 64,
    "esmfold": "random",
    "recycles": 0,
    "tasks": 2,
}
_SMALL_FEATURES = {"top": 5, "random": 5, "tasks": 2, "memory": 100_000_000, "batch_tokens": "auto"}
# A description is of a latent of another dictionary.
_NO_ANSWERS = {"descriptions": None, "predictions": None}
_EVERY = {"log_every": 1, "checkpoint_every": STEPS // 2}


def bugfix(experiment: Experiment, assets: Path) -> Experiment:
    """The experiment as a smoke run on `assets/smoke.fasta.gz` and the bundled model.

    Swept values of a field that is cut are replaced too, distinct where they were. An axis over inputs or
    over a whole section is left out. Cutting twice changes nothing.
    """
    fasta = str(assets / SMOKE_FASTA)
    data = experiment.dump()
    _own_data(data)
    layers = _layer_map(data)
    data |= {"root": "runs/bugfix", "data_root": None, "storage": {}, "model": {"weights": "bundled"}, "limits": {}}
    gpus = experiment.launch.gpus
    data["launch"] = {"executor": "local", "gpus": 0 if gpus == 0 else "auto", "ranks": 2, "workers": 2}
    if data["wandb"]["mode"] == "online":
        data["wandb"]["mode"] = "offline"
    if data["embed"] is not None:
        embedded = dict.fromkeys(layers[layer] for layer in data["embed"]["layers"])
        data["embed"] |= {"fasta": fasta, "imported": None, "layers": list(embedded), "max_length": 1022}
        data["embed"] |= {"compute": "auto", "batch_tokens": "auto", "compile": "auto"}
    for path, value in _SMALL_DATA.items():
        section, _, field = path.partition(".")
        if data[section] is not None:
            data[section][field] = value
    if data["embed"] is not None and data["embed"].get("layout") == "bucketed":
        data["embed"]["shard"] = _SORTED_SHARD
    if data["train"] is not None:
        _cut_train(data["train"], layers, fasta)
    if data["eval"] is not None:
        if experiment.has_dictionary:
            data["eval"]["fidelity"] |= {"proteins": 8, "batch_tokens": "auto"}
        data["eval"] |= dict.fromkeys(_ANNOTATED)
        _cut_language_models(data, fasta)
        if data["eval"]["features"] is not None:
            data["eval"]["features"] |= _SMALL_FEATURES
            if data["eval"]["features"]["describe"] is not None:
                data["eval"]["features"]["describe"] |= _NO_ANSWERS
        if data["eval"]["structure"] is not None:
            _cut_structure(data["eval"]["structure"], fasta)
        if data["eval"]["steering"] is not None:
            data["eval"]["steering"] |= _SMALL_STEERING
    if data["sweep"] is not None:
        _cut_sweep(data["sweep"], layers, data["train"])
    return Experiment.model_validate(data)


def _cut_structure(structure: dict[str, Any], fasta: str) -> None:
    structure |= {**_SMALL_STRUCTURE, "fasta": fasta}
    structure["k"] = sorted({min(k, _MOST_ACTIVE) for k in structure["k"]})[-2:]
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
        evaluated["lm"] |= {**_SMALL_LM, "fasta": fasta, "models": kept}
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
    data["embed"] = {**embed, "layers": sorted({*embed["layers"], train["layer"], *_swept_layers(data)})}
    data["shuffle"] = data["shuffle"] or {}
    data["optimize"] = data["optimize"] or {}


def _cut_train(train: dict[str, Any], layers: Mapping[int, int], fasta: str) -> None:
    is_plm = train["kind"] == "plm"
    batch = _PLM_BATCH if is_plm else _ROWS
    train |= {"tokens": STEPS * batch, "batch_tokens": batch, "compute": "auto", **_EVERY}
    train |= {"loader": "blocks", "cache": None, "cache_limit": CACHE_LIMIT}
    train["imported"] = None  # it is as wide as the real model: a small one is trained in its stead
    if train["layer"] is not None:
        train["layer"] = layers[train["layer"]]
    for field, most in (("lr_warmup_steps", STEPS // 4), ("dead_tokens", 2 * batch)):
        if train[field] != "auto":
            train[field] = min(train[field], most)
    if is_plm:
        valid = dict.fromkeys(train["plm"]["valid"], fasta)
        train["plm"] |= {**_SMALL_PLM, "fasta": fasta, "bin": None, "valid": valid}
        for field, most in _CAPPED_PLM.items():
            value = train["plm"][field]
            if value is not None and value != entries()[f"train.plm.{field}"].default:
                train["plm"][field] = min(value, most)
        return
    sae = train["sae"] or {}
    expansion = min(sae.get("expansion") or _MOST_EXPANSION, _MOST_EXPANSION)
    sae |= {"expansion": expansion, "num_latents": None}
    if "k" in OPTIONS[sae.get("architecture", "topk")]:
        sae["k"] = min(sae.get("k", _MOST_ACTIVE), _MOST_ACTIVE)
    for field, most in (("k_aux", 4 * _MOST_ACTIVE), ("k_start", 2 * _MOST_ACTIVE), ("num_experts", _MOST_EXPERTS)):
        if sae.get(field) is not None:
            sae[field] = min(sae[field], most)
    train["sae"] = sae
    if train["saes"] is not None:
        train["saes"] = _cut_saes(train["saes"])


def _cut_saes(saes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first two of the list, their numbers cut as those of a grid."""
    cut = [dict(sae) for sae in saes[:_MOST_TRIALS]]
    for name in dict.fromkeys(name for sae in cut for name in sae):
        having = [sae for sae in cut if name in sae]
        for sae, value in zip(
            having, _cut_values(f"train.sae.{name}", [s[name] for s in having], {}, False), strict=True
        ):
            sae[name] = value
    for sae in cut:
        if sae.get("num_latents") is not None:
            sae["expansion"] = None
    return _distinct(cut)


def _layer_map(data: Mapping[str, Any]) -> dict[int, int]:
    """Every layer the experiment names -> a layer of the bundled model, in the same order."""
    named = list(data["embed"]["layers"]) if data["embed"] is not None else []
    if data["train"] is not None and data["train"]["layer"] is not None:
        named.append(data["train"]["layer"])
    return spread([*named, *_swept_layers(data)], BUNDLED_LAYERS)


def _swept_layers(data: Mapping[str, Any]) -> list[int]:
    grid = _listed(data["sweep"]) if data["sweep"] is not None else {}
    lists = [grid.get("train.layer", []), *grid.get("embed.layers", [])]
    return [layer for values in lists for layer in values if layer is not None]


def spread(numbers: Iterable[int], most: int) -> dict[int, int]:
    """Numbers from 0 -> numbers up to `most`, in order, distinct while there is room; kept if they fit."""
    ordered = sorted(set(numbers))
    if not ordered or ordered[-1] <= most:
        return {number: number for number in ordered}
    if len(ordered) > most + 1:
        return {number: rank * most // (len(ordered) - 1) for rank, number in enumerate(ordered)}
    result: dict[int, int] = {}
    lowest = 0
    for rank, number in enumerate(ordered):
        highest = most - (len(ordered) - 1 - rank)
        result[number] = min(max(round(number * most / ordered[-1]), lowest), highest)
        lowest = result[number] + 1
    return result


# Swept numbers -> the largest that a smoke run permits. Two values above it become half of it and it.
_CAPPED: dict[str, float] = {
    "train.sae.k": _MOST_ACTIVE,
    "train.sae.k_aux": 4 * _MOST_ACTIVE,
    "train.sae.k_start": 2 * _MOST_ACTIVE,
    "train.sae.num_experts": _MOST_EXPERTS,
    "train.sae.expansion": _MOST_EXPANSION,
    "train.sae.num_latents": _WIDEST,
    "train.lr_warmup_steps": STEPS // 4,
    "train.dead_tokens": 2 * _ROWS,
    "eval.fidelity.proteins": 8,
    **{f"train.plm.{field}": most for field, most in _CAPPED_PLM.items()},
}
# The same, but replaced in any case: these must suit each other and the two ranks.
_SET: dict[str, float] = {
    "train.tokens": STEPS * _ROWS,
    "train.batch_tokens": _ROWS,
    "optimize.block_rows": _ROWS,
    **{f"train.plm.{field}": most for field, most in _SMALL_PLM.items()},
}
# Axes that name inputs, sizes or machines: a smoke run has one of each.
_FIXED = (
    "data_root", "launch", "storage", "model", "wandb", "limits", "embed.fasta", "embed.imported", "embed.shard",
    "embed.ordered_rows", "embed.compute", "embed.batch_tokens", "embed.compile", "embed.max_length", "shuffle.memory",
    "optimize.chunk", "train.data", "train.imported",
    "train.compute", "train.log_every", "train.checkpoint_every", "train.plm.fasta", "train.plm.bin", "train.plm.valid",
    "eval.fidelity.batch_tokens", *(f"eval.steering.{field}" for field in _SMALL_STEERING), "eval.structure",
    *(f"eval.{axis}" for axis in (*_ANNOTATED, "representations")),
    *(f"eval.lm.{field}" for field in (*_SMALL_LM, "fasta", "models")),
    *(f"eval.features.{field}" for field in _SMALL_FEATURES),
    *(f"eval.features.describe.{field}" for field in _NO_ANSWERS), *(f"eval.{axis}" for axis in _ANNOTATED),
)  # fmt: skip
_MOST_TRIALS = 2


def _listed(sweep: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values of each swept field; of a range its ends."""
    search = sweep["random"] or sweep["optuna"]
    axes = sweep["grid"] if search is None else search["space"]
    return {path: each if isinstance(each, list) else [each["low"], each["high"]] for path, each in axes.items()}


def _cut_sweep(sweep: dict[str, Any], layers: Mapping[int, int], train: dict[str, Any]) -> None:
    cut = _cut_grid(_listed(sweep), layers, train)
    if sweep["grid"] is not None:
        sweep["grid"] = cut
        return
    search = sweep["random"] or sweep["optuna"]
    search |= {"space": cut, "trials": min(search["trials"], _MOST_TRIALS, math.prod(map(len, cut.values())))}


def _cut_grid(
    grid: Mapping[str, Sequence[Any]], layers: Mapping[int, int], train: dict[str, Any]
) -> dict[str, list[Any]]:
    axes: dict[str, list[Any]] = {}
    trials = 1
    for path, values in grid.items():
        fixed = any(path == name or path.startswith(f"{name}.") for name in _FIXED)
        if fixed or entries()[path].section is not None:
            continue
        kept = list(values[:2]) if 2 * trials <= _MOST_TRIALS else list(values[:1])
        trials *= len(kept)
        axes[path] = _cut_values(path, kept, layers, train["kind"] == "plm")
    if "train.sae.num_latents" in axes:
        train["sae"]["expansion"] = None
    return axes or {"train.seed": [0, 1]}


def _cut_values(path: str, values: list[Any], layers: Mapping[int, int], is_plm: bool) -> list[Any]:
    if path == "train.layer":
        return _distinct([value if value is None else layers[value] for value in values])
    if path == "embed.layers":
        return _distinct([list(dict.fromkeys(layers[layer] for layer in value)) for value in values])
    most = _SET.get(path, _CAPPED.get(path))
    numbers = sorted({value for value in values if isinstance(value, (int, float))})
    if most is None or not numbers or (path in _CAPPED and numbers[-1] <= most):
        return values
    if is_plm and path in ("train.tokens", "train.batch_tokens"):
        most *= _PLM_BATCH // _ROWS
    small = [most / 2 if isinstance(most, float) else most // 2, most][-len(numbers) :]
    replaced = dict(zip(numbers, small, strict=True))
    return [replaced.get(value, value) if isinstance(value, (int, float)) else value for value in values]


def _distinct(values: list[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value not in values[:index]]
