"""`hf:` weights: an encoder that transformers reads, found on this machine and identified by its content."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from plmsae_cli.config.errors import UserError, first_line
from plmsae_cli.store.digests import remembered_sha256
from plmsae_cli.store.weight_files import require_sound

PREFIX = "hf:"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def is_encoder(weights: str) -> bool:
    """Whether `model.weights` asks for transformers."""
    return weights.startswith(PREFIX)


def hide_broken_torchvision() -> None:
    """Have transformers do without torchvision, which it takes for images, where that is broken.

    One that was built for another torch (that of PyPI beside torch's CPU wheel) breaks off with `operator torchvision::nms
    does not exist`, and would take transformers along.
    """
    try:
        import_module("torchvision")
        return
    except Exception:  # absent, hidden by someone else, or broken, which may be an error of any kind
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    if (asked := sys.modules.get("transformers.utils.import_utils")) is None:
        return
    # It may have looked before: transformers 4 keeps the answer in a variable, 5 in caches.
    vars(asked).update(_torchvision_available=False)
    for name in ("is_torchvision_available", "is_torchvision_v2_available"):
        if forget := getattr(getattr(asked, name, None), "cache_clear", None):
            forget()


def transformers_module() -> Any:
    """The package. Raises UserError with the line that installs it."""
    hide_broken_torchvision()
    try:
        module: Any = import_module("transformers")
        module.AutoModel  # noqa: B018 loads what may be broken here
        return module
    except ModuleNotFoundError as error:
        raise UserError(
            "model.weights: hf: needs the package transformers, which is not installed", 'pip install "plmsae[hf]"'
        ) from error
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"model.weights: hf: the package transformers does not work here: {first_line(error)}",
            'pip install --force-reinstall "plmsae[hf]"',
        ) from error


def quietly(call: Callable[[], Any], what: str) -> Any:
    """`call()` of transformers without its notes. Raises UserError with the first line of whatever it raises."""
    logging = transformers_module().logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return call()
    except Exception as error:  # transformers raises many kinds for folders that are not whole
        raise UserError(
            f"model.weights: {what}: {first_line(error)}", "is the folder whole, and made by save_pretrained?"
        ) from error
    finally:
        logging.set_verbosity(level)


def encoder_folder(weights: str) -> Path:
    """The local folder of an `hf:` model: the one named, or the name's in the Hugging Face cache. Nothing is downloaded."""
    name = weights.removeprefix(PREFIX)
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    transformers_module()  # which brings huggingface_hub
    try:
        return Path(import_module("huggingface_hub").snapshot_download(name, local_files_only=True))
    except Exception as error:  # a name that is none, or not in the cache
        raise UserError(
            f"model.weights: {name} is no folder, and not in the local Hugging Face cache",
            f"fetch it once with `hf download {name}`, or name a folder",
        ) from error


def resolve_encoder(weights: str, cache: Path) -> tuple[str, Path, str, dict[str, Any]]:
    """Name, folder, sha256 of the weight files, and what else decides the rows: layers, width, and hashes of the
    configuration and of the tokeniser's files.

    Raises UserError where the model is absent, damaged or without a tokeniser, holds its weights in pickles alone, or does not
    say its shape.
    """
    folder = encoder_folder(weights)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"model.weights: {folder} has no .safetensors file",
            "save the model with safe_serialization; pytorch_model.bin is a pickle and is not read",
        )
    require_sound(files)
    auto = transformers_module().AutoConfig
    about = quietly(lambda: auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False), str(folder))
    shape = {"num_layers": getattr(about, "num_hidden_layers", None), "d": getattr(about, "hidden_size", None)}
    if not all(isinstance(value, int) for value in shape.values()):
        raise UserError(
            f"model.weights: {folder}/config.json does not say num_hidden_layers and hidden_size",
            "is it a text encoder?",
        )
    hashes = [remembered_sha256(file, cache) for file in files]
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    tokeniser = [
        (file.name, remembered_sha256(file, cache)) for n in _TOKENIZER_FILES if (file := folder / n).is_file()
    ]
    if not tokeniser:
        raise UserError(
            f"model.weights: {folder} has no tokeniser: none of {', '.join(_TOKENIZER_FILES[:3])}, ...",
            "copy the tokeniser's files into it (`tokeniser.save_pretrained`), or leave `hf:` out for an ESM-2",
        )
    settings = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    config = {**shape, "settings": settings, "tokeniser": hashlib.sha256(json.dumps(tokeniser).encode()).hexdigest()}
    name = weights.removeprefix(PREFIX).rstrip("/")
    return (Path(name).name if Path(name).expanduser().is_dir() else name), folder, sha256, config
