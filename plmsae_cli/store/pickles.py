"""Pickles of tensors, read without running any code of theirs: the one place that unpickles."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from plmsae_cli.config.errors import UserError, first_line


class Inert:
    """Stands for a class of another project in a pickle: the file names it, nothing of it is imported or run."""

    def __init__(self, *_: object) -> None: ...


def read_pickle(path: Path, allowed: Sequence[type], named: Sequence[str] = ()) -> Any:
    """What `torch.save` wrote, if it holds nothing but tensors, plain values and the classes `allowed`.

    No code of the file runs: torch's restricted unpickler refuses every other class; in place of those in `named`
    (`package.module.Class`) it puts `Inert`. Tensors are mapped from the file where its layout allows. Raises UserError
    for a refused class (named) and for a damaged file.
    """
    try:
        with torch.serialization.safe_globals([*allowed, *((Inert, name) for name in named)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the unpickler raises many kinds for damaged files
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise UserError(
                f"{path} holds an object of {refused[1]}, which is not data: it was not read",
                hint="a pickle can run any code; use weights from a source you trust",
            ) from error
        # Only the first sentence: torch goes on to advise loading without its safety.
        reason = f"{type(error).__name__}: {first_line(error).split('. ')[0]}"
        raise UserError(
            f"{path} is not a checkpoint that torch can read: {reason}", hint="delete it and fetch it again"
        ) from error
