"""A run's language model as a Hugging Face folder: safetensors, configuration, tokeniser, card, and code where there is need.

An ESM-2 becomes a plain `EsmForMaskedLM`. A UNet comes with `modeling_plmsae_unet.py`, which needs torch and transformers alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from plmsae_cli.config.errors import UserError, first_line
from plmsae_cli.plm.alphabet import TOKEN_NAMES
from plmsae_cli.runtime.hub.esm import esm_config, esm_state
from plmsae_cli.runtime.hub.unet import MODELING, unet_config, unet_state
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.tensorfile import write_tensors
from plmsae_cli.store.weights import resolve_weights


def export_run(run: str, folder: Path, store: Store | None = None) -> list[str]:
    """Write the folder and give the names of its files.

    Args:
        run: a run's folder, its `plm/`, or what else `model.weights` may be, `hf:` apart.
        folder: new or empty.

    Raises:
        UserError: no language model there, or the folder holds something already.
    """
    store = store or Store()
    of_run = join(run, "plm")
    weights = of_run if store.exists(join(of_run, "config.json")) else run
    try:
        info = resolve_weights(weights, store, download=False)
    except UserError as error:
        message = f"{run} holds no language model to export: {error.message.removeprefix('model.weights: ')}"
        raise UserError(message, "name a run of train.kind: plm that has finished") from error
    model = load_plm(info)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder", "name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    facts = _facts(store, weights) if info.format == "plmsae" else {}
    longest = int((facts.get("train", {}).get("plm") or {}).get("max_length", 1022)) + 2
    is_unet = info.config.get("architecture") == "unet"
    state, config = dict(model.state_dict()), dict(info.config)
    about = unet_config(config, longest) if is_unet else esm_config(config, longest)
    texts = {
        "config.json": json.dumps(about, indent=2) + "\n",
        "vocab.txt": "\n".join(TOKEN_NAMES) + "\n",
        "tokenizer_config.json": json.dumps(_tokeniser(longest), indent=2) + "\n",
        "README.md": _card(info.name, config, facts, is_unet),
    }
    if is_unet:
        texts[MODELING] = (files("plmsae_cli.runtime.hub") / MODELING).read_text(encoding="utf-8")
    tensors: Mapping[str, torch.Tensor] = unet_state(state) if is_unet else esm_state(state, config)
    write_tensors(store, str(folder / "model.safetensors"), tensors, {"format": "pt"})
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return sorted(["model.safetensors", *texts])


def _facts(store: Store, weights: str) -> dict[str, Any]:
    return dict(json.loads(store.read(join(weights, "config.json"))).get("facts", {})) if weights != "bundled" else {}


def _tokeniser(longest: int) -> dict[str, Any]:
    names = {
        "cls_token": "<cls>",
        "eos_token": "<eos>",
        "mask_token": "<mask>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    return {"tokenizer_class": "EsmTokenizer", "model_max_length": longest, **names}


def _card(name: str, config: Mapping[str, Any], facts: Mapping[str, Any], is_unet: bool) -> str:
    kind = "UNet transformer" if is_unet else "ESM-2 encoder"
    remote = ", trust_remote_code=True" if is_unet else ""
    lines = [
        f"# {name}: a protein language model",
        "",
        f"{kind}, {config['num_layers']} layers of width {config['d']}, {config['num_heads']} heads, trained with plmsae.",
        "",
        "```python",
        "from transformers import AutoModelForMaskedLM, AutoTokenizer",
        "",
        'model = AutoModelForMaskedLM.from_pretrained("THIS_FOLDER"' + remote + ").eval()",
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        'logits = model(**tokenizer(["MKTAYIAK<mask>RQISF"], return_tensors="pt")).logits',
        "```",
        "",
    ]
    if "tokens" in facts:
        lines += [f"Trained on {facts['tokens']:,} tokens in {facts['steps']:,} steps."]
    for split, row in facts.get("valid", {}).items():
        lines += [f"Validation, {split}: loss {row['loss']:.4f} nats, perplexity {row['perplexity']:.2f}."]
    if not is_unet:
        lines += ["", "Its contact head was never trained: `predict_contacts` says nothing."]
    return "\n".join(lines) + "\n"


def wants_token() -> bool:
    """Whether `push` would fail for want of a token alone."""
    try:
        from huggingface_hub import get_token
    except ModuleNotFoundError:  # `push` says how to install it
        return False
    return get_token() is None


def push(folder: Path, name: str) -> str:
    """Upload the folder as the model `name` (`owner/model`, private until its owner says otherwise); gives its address.

    The token is that of `hf auth login` or of HF_TOKEN.

    Raises:
        UserError: huggingface_hub is not installed, no token, or the hub refused.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    except ModuleNotFoundError as error:
        raise UserError("--push needs huggingface_hub", "pip install 'plmsae[hf]'") from error
    hint = f"the folder is complete: `hf upload {name} {folder}` sends it another time"
    try:
        api = HfApi()
        api.whoami()  # before anything is sent, and without a name the token is not for
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except LocalTokenNotFoundError as error:
        raise UserError(
            "--push: the hub wants a token, and there is none", f"`hf auth login`, or set HF_TOKEN; {hint}"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"--push: {name} was not uploaded: {first_line(error)}", hint) from error
    return str(address)
