"""A file, or a folder of files, as one matrix of rows; and the hash that stands for its content.

InterPLM's shards (https://github.com/ElanaPearl/InterPLM, `train/data_loader.py`, `data_processing/embedding_loader.py`):
folders with `activations.pt` or `activations.dat` beside `metadata.json` or `metadata.yaml`, folders with `embeddings.pt`, or
files `shard_<i>.pt`.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.digests import remembered_xxh3
from plmsae_cli.store.imports.arrow import ArrowPart, data_files
from plmsae_cli.store.imports.parts import NpyPart, Part, RawPart, SafetensorsPart, TorchPart, refuse

_SUFFIXES = {"npy": (".npy",), "safetensors": (".safetensors",), "saelens": (".arrow",), "interplm": (".pt", ".dat")}
_SHARD_FILES = ("activations.pt", "activations.dat", "embeddings.pt")


class Source:
    """Rows [0, num_rows) of width `d`, file after file."""

    def __init__(self, path: Path, kind: str, parts: Sequence[Part]) -> None:
        self.path, self.format, self.parts = path, kind, list(parts)
        filled = [part for part in self.parts if part.shape[0]]
        if not filled:
            raise refuse(path, "has no rows", "is it the right folder, and was it written to the end?")
        self.d = filled[0].shape[1]
        for part in filled:
            if part.shape[1] != self.d:
                first = f"those of {filled[0].path.name} are {self.d} wide"
                raise refuse(part.path, f"has rows of width {part.shape[1]}, {first}", "all files need one width")
        self._starts = list(accumulate((part.shape[0] for part in self.parts), initial=0))
        self._open: Part | None = None

    @property
    def num_rows(self) -> int:
        return self._starts[-1]

    def digest(self, cache: Path) -> str:
        """sha256 over size and xxh3 of each file in order, and the width: what the files hold, not what they are called."""
        hashes = [[part.path.stat().st_size, remembered_xxh3(part.path, cache)] for part in self.parts]
        return hashlib.sha256(json.dumps([self.d, hashes]).encode()).hexdigest()

    def read(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows [start, stop) in `dtype`, [R, d]. Raises UserError where a number is not finite, naming file and row."""
        out_RD = torch.empty(stop - start, self.d, dtype=dtype)
        row = start
        while row < stop:
            index = bisect_right(self._starts, row) - 1
            part, first = self.parts[index], self._starts[index]
            end = min(stop, self._starts[index + 1])
            if self._open is not part:
                if self._open is not None:
                    self._open.close()
                self._open = part
            rows_RD = part.read(row - first, end - first)
            target_RD = out_RD[row - start : end - start]
            target_RD.copy_(rows_RD)
            if not bool(target_RD.isfinite().all()):
                raise self._not_finite(part, rows_RD, target_RD, row - first)
            row = end
        return out_RD

    def _not_finite(self, part: Part, rows_RD: torch.Tensor, stored_RD: torch.Tensor, first: int) -> UserError:
        at = first + int((~stored_RD.isfinite()).any(1).int().argmax())
        if bool(rows_RD.isfinite().all()):
            kind = str(stored_RD.dtype).removeprefix("torch.")
            return refuse(part.path, f"row {at:,} is beyond the range of embed.dtype {kind}", "use bfloat16 or float32")
        return refuse(part.path, f"row {at:,} has NaN or infinity", "leave such rows out, or compute them again")


def open_source(path: str, kind: str) -> Source:
    """The activations at a local path, by their headers alone.

    Raises UserError, naming the file, where they are absent, of another kind than `kind` (`auto`: by their names), not
    matrices of floating-point numbers, of different widths, damaged, or pickles of anything but data.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise refuse(place, "does not exist", "relative paths start at the working folder")
    found = {name: files for name in _SUFFIXES if (files := _files(place, name))}
    if kind == "auto":
        if len(found) != 1:
            raise _undecided(place, found)
        (kind,) = found
    files = found.get(kind, [])
    if not files:
        raise refuse(
            place, f"has no files of format {kind}", _nested(place) or "name the folder that has the files itself"
        )
    stats = [(file, file.stat()) for file in files]
    return _opened(place, kind, tuple((file, status.st_size, status.st_mtime_ns) for file, status in stats))


@lru_cache(maxsize=8)
def _opened(place: Path, kind: str, files: tuple[tuple[Path, int, int], ...]) -> Source:
    # A process opens the same files for each of its tasks, and there may be thousands.
    make: dict[str, Callable[[Path], Part]] = {
        "npy": NpyPart, "safetensors": SafetensorsPart, "saelens": ArrowPart, "interplm": _interplm
    }  # fmt: skip
    return Source(place, kind, [make[kind](file) for file, _, _ in files])


def _files(place: Path, kind: str) -> list[Path]:
    suffixes = _SUFFIXES[kind]
    if place.is_file():
        return [place] if place.suffix in suffixes else []
    if kind == "interplm":
        shards = [found for folder in place.iterdir() if folder.is_dir() and (found := _shard(folder)) is not None]
        if shards:
            return _in_order(shards, lambda file: file.parent.name)
    plain = [file for file in place.iterdir() if file.suffix in suffixes and not file.name.startswith(".")]
    ordered = _in_order([file for file in plain if file.is_file()], lambda file: file.name)
    return data_files(place, ordered) if kind == "saelens" and ordered else ordered


def _shard(folder: Path) -> Path | None:
    return next((folder / name for name in _SHARD_FILES if (folder / name).is_file()), None)


def _in_order(files: Iterable[Path], name: Callable[[Path], str]) -> list[Path]:
    """By name, numbers in it by value: shard_2 before shard_10."""

    def key(file: Path) -> list[tuple[int, int, str]]:
        return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name(file)) if p]

    return sorted(files, key=key)


def _undecided(place: Path, found: dict[str, list[Path]]) -> UserError:
    if found:
        return refuse(
            place, f"holds files of several formats: {', '.join(found)}", "say which in embed.imported.format"
        )
    hint = _nested(place) or "formats: .npy, .safetensors, InterPLM's shards (.pt, .dat), SAELens's caches (.arrow)"
    return refuse(place, "holds no activations", hint)


def _nested(place: Path) -> str | None:
    layers = (
        [f.name for f in place.iterdir() if f.is_dir() and re.fullmatch(r"layer_\d+", f.name)] if place.is_dir() else []
    )
    return f"it has folders such as {layers[0]}: write path: {place}/layer_{{layer}}" if layers else None


def _interplm(path: Path) -> Part:
    about = _metadata(path)
    if path.suffix == ".dat":
        try:
            return RawPart(path, int(about["total_tokens"]), int(about["d_model"]))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            hint = "its metadata.json or metadata.yaml belongs beside it, with total_tokens and d_model"
            raise refuse(path, "has no metadata that say its shape", hint) from error
    part = TorchPart(path)
    for name, value in zip(("total_tokens", "d_model"), part.shape, strict=True):
        if name in about and about[name] != value:
            raise refuse(path, f"holds {value:,}, its metadata say {name} {about[name]}", "copy the shard again")
    return part


def _metadata(path: Path) -> dict[str, Any]:
    for name in ("metadata.json", "metadata.yaml"):
        file = path.with_name(name)
        if path.name in _SHARD_FILES and file.is_file():
            from ruamel.yaml import YAML
            from ruamel.yaml.error import YAMLError

            try:  # JSON is YAML
                body = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
            except (YAMLError, UnicodeDecodeError) as error:
                raise refuse(file, "is not sound metadata", "copy the shard again") from error
            return body if isinstance(body, dict) else {}
    return {}
