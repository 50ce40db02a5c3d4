"""The safetensors files of a model: one, or several that an index names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.weight_names import State


def tensor_files(path: Path) -> list[Path]:
    """The safetensors files that `path` stands for: itself, or those of a Hugging Face index beside it."""
    if path.suffix != ".json":
        return [path]
    try:
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        files = [path.with_name(Path(name).name) for name in names]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is not an index of safetensors files: {error}") from error
    for file in files:
        if not file.is_file():
            raise UserError(f"{path} names {file.name}, which is not beside it")
    return files


def read_tensors(path: Path) -> State:
    """All tensors of the files that `path` stands for. Raises UserError where one is damaged."""
    state: State = {}
    for file in tensor_files(path):
        with _opened(file) as tensors:
            state |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 it is no mapping
    return state


def require_sound(files: Sequence[Path]) -> None:
    """Raises UserError where a file is cut short or none of safetensors', as its header tells: before anything is planned on
    it."""
    for file in files:
        with _opened(file):
            pass


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The file's tensors. Raises UserError where it is damaged, which its header tells."""
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a sound safetensors file: {error}", "copy or download it again") from error
