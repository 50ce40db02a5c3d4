"""Weights of ESM-2 models: found, identified, and read into one set of names.

Everything here is plain data: a model's shape is a dict with `num_layers`, `d`, `num_heads`, `token_dropout`
and `vocab`, its state a dict of tensors under fair-esm's names. What differs from fair-esm: the rotary
frequencies stand once, as `rotary.inv_freq`; the tied output weight and the contact head are left out.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from safetensors import safe_open

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.digests import remembered_sha256
from plmsae_cli.store.download import download as fetch
from plmsae_cli.store.encoders import is_encoder, resolve_encoder
from plmsae_cli.store.fs import FileRecord, Store, join
from plmsae_cli.store.pickles import read_pickle
from plmsae_cli.store.sources import ESM2_URL, mirrored
from plmsae_cli.store.tensorfile import write_tensors
from plmsae_cli.store.weight_files import read_tensors, require_sound, tensor_files
from plmsae_cli.store.weight_names import State, check_state, from_fair_esm, from_hugging_face

PUBLISHED = {
    "esm2_t6_8M_UR50D": 6,
    "esm2_t12_35M_UR50D": 12,
    "esm2_t30_150M_UR50D": 30,
    "esm2_t33_650M_UR50D": 33,
    "esm2_t36_3B_UR50D": 36,
    "esm2_t48_15B_UR50D": 48,
}
"""Published names, and the layers of each."""
BUNDLED = Path(__file__).parents[1] / "data" / "bundled"
OWN_FORMATS = {"esm2": "plmsae.esm2/1", "unet": "plmsae.unet/1"}


@dataclass(frozen=True)
class WeightsInfo:
    """Where weights are and what they are; `load_state` reads them."""

    name: str
    """`bundled`, a published name, `facts.name` of a folder of ours, or else the file's or folder's name."""
    path: Path
    """A local safetensors file; for a `.pt` the copy made of it in the cache; for an `encoder` its folder."""
    sha256: str
    """Of the original file (the `.pt`, or `model.safetensors`)."""
    format: Literal["fair-esm", "hf", "plmsae", "encoder"]
    config: dict[str, Any]
    """`num_layers`, `d`, `num_heads`, `token_dropout`, `vocab`; of a UNet the fields of its configuration; of an `encoder`
    (`hf:`) the first two, and hashes of its settings and its tokeniser."""

    @property
    def convention(self) -> str:
        """What layer k is, in words, as manifests have it."""
        if self.format == "encoder":
            return "hidden states as transformers counts them; 0 embedding; last what the encoder returns"
        if self.config.get("architecture") == "unet":
            return "residual stream after block k; 0 normalised embedding; last without a norm"
        return "residual stream after block k; 0 scaled embedding; last after final LayerNorm"

    def final_layer_norm(self, layer: int) -> bool | None:
        """Whether ESM-2's last LayerNorm was applied to the layer; None of an `encoder`, which may have one or not."""
        if self.format == "encoder":
            return None
        return layer == self.config["num_layers"] and self.config.get("architecture") != "unet"


def cache_folder() -> Path:
    """`$PLMSAE_CACHE`, by default `~/.cache/plmsae`."""
    return Path(os.environ.get("PLMSAE_CACHE") or "~/.cache/plmsae").expanduser()


def resolve_weights(
    name_or_path: str, store: Store, cache: Path | None = None, *, download: bool = True
) -> WeightsInfo:
    """Find weights by what a user writes, and identify them.

    `name_or_path` is `bundled`; a published fair-esm name, looked for in torch's hub folder and in `cache`
    and otherwise downloaded; a fair-esm `.pt`; a folder (Hugging Face's or ours) with config.json and
    model.safetensors; a run that trained a language model, which has such a folder `plm`; or `hf:` and any
    encoder's folder or name (see `encoders`). A `.pt` is converted once, into `cache`; hashes of large files
    are remembered there.

    Raises UserError where nothing is found, a file is damaged or holds objects other than data, or the
    weights are not those of an ESM-2 model of the shape they state. With `download=False` absent weights are
    an error at once.
    """
    cache = cache or cache_folder()
    if is_encoder(name_or_path):
        name, folder, sha256, config = resolve_encoder(name_or_path, cache)
        return WeightsInfo(name, folder, sha256, "encoder", config)
    if name_or_path == "bundled":
        return _from_folder(str(BUNDLED), "bundled", store, cache)
    if name_or_path in PUBLISHED:
        return _from_pt(_published_file(name_or_path, cache, download), name_or_path, cache)
    if name_or_path.endswith(".pt"):
        if not store.exists(name_or_path):
            raise UserError(f"model.weights: there is no file {name_or_path}")
        return _from_pt(store.local(name_or_path), Path(name_or_path).stem, cache)
    for place in (name_or_path, join(name_or_path, "plm")):
        if store.exists(join(place, "config.json")):
            return _from_folder(place, Path(name_or_path).name, store, cache)
    near = difflib.get_close_matches(name_or_path, ["bundled", *PUBLISHED], n=1)
    raise UserError(
        f"model.weights: {name_or_path!r} is no published name, no .pt file and no folder with a config.json",
        hint=f"did you mean {near[0]}?" if near else f"published names: {', '.join(PUBLISHED)}; or `bundled`",
    )


def load_state(info: WeightsInfo) -> State:
    """The tensors in our names, in the dtypes they are stored in, checked against the configuration.

    `rotary.inv_freq` is there only if the file holds it. Raises UserError as `resolve_weights` does, and for an `hf:` model,
    whose tensors have names of their own.
    """
    if info.format == "encoder":
        raise UserError(
            f"model.weights: hf:{info.name} can be embedded, but not taken apart as this needs",
            "name an ESM-2 model without hf:, or leave this out",
        )
    state = read_tensors(info.path)
    if info.format == "hf":
        state = from_hugging_face(state, str(info.path))
    check_state(state, info.config, str(info.path))
    return state


def save_model(
    store: Store,
    folder: str,
    state: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> list[FileRecord]:
    """Write a folder that `resolve_weights` reads: model.safetensors, then config.json with `facts` (plain
    JSON)."""
    check_state(dict(state), config, folder)
    model = write_tensors(store, join(folder, "model.safetensors"), state, {"format": "pt"})
    about = {"format": OWN_FORMATS[config.get("architecture", "esm2")], "config": dict(config), "facts": dict(facts)}
    text = json.dumps(about, indent=2, sort_keys=True).encode() + b"\n"
    return [model, store.write(join(folder, "config.json"), [text])]


def _published_file(name: str, cache: Path, download: bool) -> Path:
    places = [Path(torch.hub.get_dir()) / "checkpoints", cache / "weights"]
    for place in places:
        if (place / f"{name}.pt").is_file():
            return place / f"{name}.pt"
    base = os.environ.get("PLMSAE_WEIGHTS_URL") or mirrored(ESM2_URL, None)
    target = places[-1] / f"{name}.pt"
    problem = "it was not downloaded"
    if download:
        try:
            fetch(f"{base.rstrip('/')}/{name}.pt", target)
            return target
        except UserError as error:
            problem = error.message
    raise UserError(
        f"model.weights: {name}.pt is neither in {places[0]} nor in {places[1]}, and {problem}",
        hint=f"`plmsae fetch {name}`, or download {ESM2_URL}/{name}.pt and put it into {places[1]}",
    )


def _from_pt(path: Path, name: str, cache: Path) -> WeightsInfo:
    sha256 = remembered_sha256(path, cache)
    converted = cache / "converted" / f"{sha256}.safetensors"
    if not converted.exists():
        try:
            converted.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(converted.with_suffix(".lock")):
                if not converted.exists():
                    _convert(path, converted)
        except OSError as error:
            raise UserError(
                f"{path} could not be converted into {converted.parent}: {error}",
                hint="set PLMSAE_CACHE to a folder with room for a copy of the weights",
            ) from error
    with safe_open(converted, "pt") as file:
        config: dict[str, Any] = json.loads(file.metadata()["config"])
    if config["num_layers"] != PUBLISHED.get(name, config["num_layers"]):
        raise UserError(f"{path} holds a model of {config['num_layers']} layers, {name} has {PUBLISHED[name]}")
    return WeightsInfo(name, converted, sha256, "fair-esm", config)


def _convert(path: Path, converted: Path) -> None:
    """A fair-esm checkpoint as safetensors.

    Published files keep the settings in `cfg.model` (ESM-2) or in `args` (fairseq's older layout).
    """
    data = read_pickle(path, (argparse.Namespace,))
    try:
        settings = data["cfg"]["model"] if "cfg" in data else data["args"]
        settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
        state = from_fair_esm(data["model"], str(path))
        config = {
            "num_layers": int(settings["encoder_layers"]),
            "d": int(settings["encoder_embed_dim"]),
            "num_heads": int(settings["encoder_attention_heads"]),
            "token_dropout": bool(settings["token_dropout"]),
            "vocab": len(state["embed_tokens.weight"]),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a fair-esm ESM-2 checkpoint: {type(error).__name__} {error}",
            hint="ESM-1, ESM-1v, MSA Transformer and contact-regression files are of another kind",
        ) from error
    check_state(state, config, str(path))
    write_tensors(Store(), str(converted), state, {"config": json.dumps(config)})


def _from_folder(folder: str, name: str, store: Store, cache: Path) -> WeightsInfo:
    where = join(folder, "config.json")
    if not store.exists(where):
        raise UserError(f"model.weights: {where} is missing")
    try:
        about = json.loads(store.read(where))
        kind: Literal["hf", "plmsae"] = "plmsae" if about.get("format") in OWN_FORMATS.values() else "hf"
        facts = dict(about.get("facts", {}))
        config = dict(about["config"]) if kind == "plmsae" else _hugging_face_config(about, where)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where} does not describe an ESM-2 model: {error}") from error
    for name_of_file in ("model.safetensors", "model.safetensors.index.json"):
        if store.exists(join(folder, name_of_file)):
            path = store.local(join(folder, name_of_file))
            files = tensor_files(path)
            require_sound(files)
            hashes = [remembered_sha256(file, cache) for file in files]
            sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
            return WeightsInfo(str(facts.get("name", name)), path, sha256, kind, config)
    raise UserError(
        f"model.weights: {folder} has a config.json but no model.safetensors",
        hint="save the model with safe_serialization; pytorch_model.bin is a pickle and is not read",
    )


def _hugging_face_config(about: Mapping[str, Any], where: str) -> dict[str, Any]:
    wanted = {
        "model_type": "esm",
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": False,
        "layer_norm_eps": 1e-5,
        "intermediate_size": 4 * about["hidden_size"],
        "mask_token_id": 32,
        "pad_token_id": 1,
    }
    for field, value in wanted.items():
        found = about.get(field)
        if (found or False) != value:  # false may be written as null
            raise UserError(f"{where}: {field} is {found!r}; ESM-2 has {value!r}")
    return {
        "num_layers": about["num_hidden_layers"],
        "d": about["hidden_size"],
        "num_heads": about["num_attention_heads"],
        "token_dropout": about["token_dropout"],
        "vocab": about["vocab_size"],
    }
