"""SpeedrunningPLMs' settings: its flat YAMLs, and its command lines of flags."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from plmsae_cli.config.check import check
from plmsae_cli.config.credentials import is_secret
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.schema import FILE
from plmsae_cli.config.wording import legal_name

MARKS = (
    "num_hidden_layers",
    "lr_hidden",
    "use_muon",
    "muon_momentum_warmup_steps",
    "input_bin",
    "mask_rate_schedule",
    "lr_embed",
)
"""Names of which a file of theirs has at least two."""
TRACK_TOKENS = 65_536
"""Most tokens of a micro-batch: what one GPU takes at their sizes."""
SAME = {
    "hidden_size": "hidden_size", "num_attention_heads": "num_attention_heads", "num_hidden_layers": "num_layers",
    "expansion_ratio": "expansion_ratio", "soft_logit_cap": "soft_logit_cap", "tie_embeddings": "tie_embeddings",
    "unet": "unet", "p_attention": "p_attention", "mask_rate": "mask_rate", "eval_every": "eval_every",
}  # fmt: skip
"""Fields of train.plm that are theirs under a like name."""
WITHOUT = {
    "num_workers": "packs are made by a thread beside the training",
    "prefetch_factor": "packs are made four steps ahead",
    "clear_cache_every": "shapes are constant, so the allocator's cache never needs clearing",
    "auto_grad_clip": "train.grad_clip is a fixed norm",
    "auto_grad_clip_p": "train.grad_clip is a fixed norm",
    "compile_flex_attention": "what can be compiled is",
    "compile_model": "what can be compiled is",
    "dynamo_recompile_limit": "shapes are constant, so little is compiled twice",
    "num_chunks": "all shards that the glob names are read",
    "yaml_path": "the experiment is the file itself",
    "bugfix": "it is a flag here: plmsae run my.yaml --bugfix",
}
"""Settings that have no counterpart, and why none is needed."""
SWITCHES = {
    "mask_rate_schedule": (False, ("starting_mask_rate", "mask_rate_steps")),
    "use_muon": (True, ("lr_hidden", "lr_embed", "lr_head", "lr_scalar", "muon_momentum_warmup_steps")),
}
"""What is on or off where nothing is said, and the settings that have an effect only where it is on."""
TAKEN = {
    *SAME, *WITHOUT, "token_dropout", "add_att_soft_cap", "attention_soft_cap", "num_att_tokens", "mlm", "masked_diffusion",
    "mask_rate_schedule", "starting_mask_rate", "mask_rate_steps", "batch_size", "grad_accum", "num_steps", "cooldown_steps",
    "max_length",
    "scheduler_type", "lr_warmup_steps", "lr", "lr_embed", "lr_head", "lr_scalar", "lr_hidden", "use_muon",
    "muon_momentum_warmup_steps", "grad_clip", "save_every", "seed", "log_name", "hf_model_name", "save_path", "data_name",
    "input_bin", "input_valid_bin", "input_test_bin", "vocab_size", "bfloat16", "patch_unet", "num_unet_layers",
    "num_extra_layers",
}  # fmt: skip


def recognises(text: str) -> bool:
    """Whether the text is a YAML, or a command line, of theirs."""
    settings = _read(text)
    return sum(name in settings for name in MARKS) >= 2


def convert(text: str) -> tuple[str, list[str]]:
    """The experiment, and what of the settings was read otherwise than it looks, or not at all.

    Raises:
        UserError: values do not fit each other.
    """
    old = _read(text)
    notes: list[str] = []
    for name in ("patch_unet", "num_extra_layers"):
        if old.get(name):
            raise UserError(
                f"{name}: {old[name]} describes an architecture that there is none of here",
                "unet: true is the UNet of the speed runs; give num_hidden_layers and leave out patch_unet and num_extra_layers",
            )
    name = str(old.get("log_name") or old.get("save_path") or "speedrun").rpartition("/")[2]
    experiment = {"name": legal_name(name), "train": _train(old, notes)}
    for switch, (default, needing) in SWITCHES.items():
        idle = [name for name in needing if name in old and not old.get(switch, default)]
        notes.extend(f"{name}: of no effect there without {switch}, and left out" for name in idle)
    for name, value in old.items():
        if name in WITHOUT and value not in (None, False):
            notes.append(f"{name}: no counterpart: {WITHOUT[name]}")
        elif name in TAKEN:  # `token_dropout` among them, which is no secret
            continue
        elif is_secret(name):
            notes.append(f"{name}: secrets stay out of files; `wandb login` and `hf auth login` keep them")
        else:
            notes.append(f"{name}: unknown, and left out")
    _, findings = check(experiment)
    if findings:
        listed = "; ".join(f"{'.'.join(map(str, finding.path))}: {finding.message}" for finding in findings)
        raise UserError(f"what it describes does not fit together: {listed}", findings[0].hint)
    return _written(experiment, notes), notes


def _read(text: str) -> dict[str, Any]:
    """Name to value: of a YAML, else of the flags of a command line, which may be written with dashes, and be alone."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    yaml = YAML(typ="safe", pure=True)
    try:
        data = yaml.load(text)
    except (YAMLError, ValueError):
        data = None
    if isinstance(data, Mapping):
        return dict(data)
    # Not looked for in a YAML, whose comments speak of flags.
    if not re.search(r"(^|\s)--[a-z]", text):
        return {}
    try:
        return _flags(shlex.split(text.replace("\\\n", " "), comments=True), yaml.load)
    except (YAMLError, ValueError):  # a quote or a bracket that is not closed
        return {}


def _flags(words: list[str], value_of: Callable[[str], Any]) -> dict[str, Any]:
    """Those of the program: what stands before it is its launcher's."""
    programs = [place for place, word in enumerate(words) if word.endswith(".py")]
    words = words[programs[0] + 1 :] if programs else words
    flags = [place for place, word in enumerate(words) if word.startswith("--")]
    found: dict[str, Any] = {}
    for place, after in pairwise([*flags, len(words)]):
        name, equals, value = words[place].removeprefix("--").partition("=")
        value = value if equals else " ".join(words[place + 1 : after])
        found[name.replace("-", "_")] = value_of(value) if value else True
    return found


def _train(old: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    batch, steps = int(old.get("batch_size", 524_288)), int(old.get("num_steps", 20_000))
    muon = bool(old.get("use_muon", True))
    clip = float(old.get("grad_clip") or 0.0)
    train: dict[str, Any] = {
        "kind": "plm",
        "seed": int(old.get("seed", 42)),
        "batch_tokens": batch,
        "tokens": steps * batch,
        "optimizer": "muon" if muon else "adam",
        "betas": [0.8, 0.95],
        "grad_clip": clip if clip > 0 else None,
        "lr_warmup_steps": int(old.get("lr_warmup_steps", 0)),
    }
    if not muon:
        train["lr"] = float(old.get("lr", 1e-3))
    elif "lr" in old:
        notes.append("lr: of no effect with use_muon; lr_hidden, lr_embed, lr_head and lr_scalar are the rates")
    if old.get("save_every"):
        train["checkpoint_every"] = int(old["save_every"])
    if old.get("bfloat16") is False:
        notes.append(
            "bfloat16: there TF32; here weights are float32 too, products bfloat16 (train.compute: float32 is far slower)"
        )
    for name in ("hf_model_name", "save_path"):
        if old.get(name):
            notes.append(f"{name}: `plmsae export RUN --hf FOLDER --push {old[name]}` when the run is done")
    train["plm"] = _plm(old, batch, muon, notes)
    return train


def _plm(old: Mapping[str, Any], batch: int, muon: bool, notes: list[str]) -> dict[str, Any]:
    if int(old.get("vocab_size", 33)) != 33:
        notes.append(f"vocab_size: {old['vocab_size']} is not ESM's alphabet of 33, which is the only one")
    longest = int(old.get("max_length", 1024)) - 2
    notes.append(f"max_length: counts residues here, and both ends there: {longest}")
    plm: dict[str, Any] = {"architecture": "unet", **_shards(old, notes), "max_length": longest}
    for name, own in {"hidden_size": 768, "num_attention_heads": 6, "num_hidden_layers": 24}.items():
        plm[SAME[name]] = int(old.get(name, own))
    for name in ("expansion_ratio", "soft_logit_cap"):
        if name in old:
            plm[SAME[name]] = float(old[name])
    for name in ("tie_embeddings", "unet", "p_attention"):
        if name in old:
            plm[SAME[name]] = bool(old[name])
    if old.get("token_dropout", True):
        plm["mask_embedding"] = False
    if old.get("p_attention") and "num_att_tokens" in old:
        plm["num_att_tokens"] = int(old["num_att_tokens"])
    cap = old.get("attention_soft_cap")
    if cap and old.get("add_att_soft_cap", True):
        plm["attention_soft_cap"] = float(cap)
        notes.append("attention_soft_cap: kept; null is faster, since q and k are normed anyway")
    plm |= _objective(old, notes) | _rates(old, muon, notes)
    if "eval_every" in old:
        plm["eval_every"] = int(old["eval_every"])
    plm["pack_tokens"] = _pack(batch, int(old.get("grad_accum") or 1), longest, notes)
    return plm


def _shards(old: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Where tokens are, as their scripts lay them down."""
    name = str(old.get("data_name") or "omg_prot50")
    train = old.get("input_bin") or f"data/{name}/{name}_train_*.bin"
    valid = {
        split: str(old.get(f"input_{split}_bin") or f"data/{name}/{name}_{split}_*.bin") for split in ("valid", "test")
    }
    if "input_bin" not in old:
        notes.append(f"bin: taken to be {train}, where their download_data.py puts it")
    return {"bin": str(train), "valid": valid, "holdout": 0.0}


def _objective(old: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    diffusion = bool(old["masked_diffusion"]) if "masked_diffusion" in old else old.get("mlm") is False
    if diffusion and "masked_diffusion" not in old:
        notes.append("mlm: false without masked_diffusion is read as masked diffusion")
    found: dict[str, Any] = {"objective": "masked_diffusion" if diffusion else "mlm", "corruption": "mask"}
    if "mask_rate" in old:
        found["mask_rate"] = float(old["mask_rate"])
    if old.get("mask_rate_schedule"):
        found["starting_mask_rate"] = float(old.get("starting_mask_rate", 0.1))
        found["mask_rate_steps"] = int(old.get("mask_rate_steps", 2500))
        notes.append("mask_rate_schedule: takes effect here; there it never reached the loader's workers")
        if diffusion:
            found["diffusion_warmup_steps"] = found["mask_rate_steps"]
    return found


def _rates(old: Mapping[str, Any], muon: bool, notes: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"weight_decay": 0.0}
    if muon:
        found |= {name: float(old[name]) for name in ("lr_hidden", "lr_embed", "lr_head", "lr_scalar") if name in old}
        if "muon_momentum_warmup_steps" in old:
            found["muon_momentum_warmup_steps"] = int(old["muon_momentum_warmup_steps"])
    if old.get("cooldown_steps"):
        found["cooldown_steps"] = int(old["cooldown_steps"])
    kind = str(old.get("scheduler_type", "cosine"))
    found["scheduler_type"] = kind if kind in ("linear", "cosine") else "linear"
    if kind != found["scheduler_type"]:
        notes.append(f"scheduler_type: {kind} is read as linear over the cooldown")
    return found


def _pack(batch: int, accumulated: int, longest: int, notes: list[str]) -> int:
    """Tokens of a micro-batch: a share of the batch that a GPU takes and that holds the longest protein."""
    parts = max(1, accumulated)
    while batch % parts or batch // parts > TRACK_TOKENS:
        parts += 1
    size = batch // parts
    if size < longest + 2:
        size = batch
    notes.append(f"grad_accum: {batch:,} tokens a step are {batch // size} packs of {size:,}, shared by all GPUs")
    return size


def _written(experiment: Mapping[str, Any], notes: list[str]) -> str:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.representer.add_representer(
        type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    sink = io.StringIO()
    yaml.dump(dict(experiment), sink)
    head = [f"# yaml-language-server: $schema={FILE}", "# From settings of SpeedrunningPLMs."]
    return "\n".join([*head, *(f"# {note}" for note in notes), "", sink.getvalue()])
