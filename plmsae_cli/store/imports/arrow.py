"""SAELens's cached activations: a Hugging Face dataset on the disk, Arrow files with a matrix [context, width] a record.

https://github.com/decoderesearch/SAELens, `CacheActivationsRunner`; the folder is what `Dataset.save_to_disk` writes.
"""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from plmsae_cli.store.imports.parts import Documents, refuse


class ArrowPart:
    """An Arrow file, mapped: every position of every context is a row, a context is a document."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._column: Any = None
        lengths, widths, rows = [], set(), []
        for chunk in self._chunks():
            inner = chunk.flatten()
            lengths.append(pc.list_value_length(chunk).to_numpy(zero_copy_only=False))
            rows.append(len(inner))
            if len(inner):
                found = pc.min_max(pc.list_value_length(inner))
                widths |= {found["min"].as_py(), found["max"].as_py()}
        if len(widths) > 1:
            raise refuse(
                path, f"has rows of different widths, {min(widths)} to {max(widths)}", "all rows need one width"
            )
        self.shape = (sum(rows), widths.pop() if widths else 1)
        self._starts = list(accumulate(rows, initial=0))
        joined = np.concatenate(lengths) if lengths else np.zeros(0)
        self.documents = Documents(joined.astype(np.int32), None)
        self.close()

    def _chunks(self) -> list[Any]:
        """The lists of lists of numbers, as stored."""
        if self._column is None:
            self._column = self._open()
        return [chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk for chunk in self._column.chunks]

    def _open(self) -> Any:
        try:
            mapped = pa.memory_map(str(self.path))
            try:
                table = pa.ipc.open_stream(mapped).read_all()
            except pa.ArrowInvalid:
                mapped.seek(0)
                table = pa.ipc.open_file(mapped).read_all()
        except (pa.ArrowException, OSError) as error:
            raise refuse(self.path, f"is not a sound Arrow file: {error}", "copy it again") from error
        kinds = {name: _leaf(table.schema.field(name).type) for name in table.column_names}
        nested = [name for name, (depth, _) in kinds.items() if depth == 2]
        if len(nested) != 1:
            listed = ", ".join(table.column_names)
            raise refuse(
                self.path, f"has {len(nested)} columns of matrices, not one (columns: {listed})", "keep one hook"
            )
        leaf = kinds[nested[0]][1]
        if not pa.types.is_floating(leaf):
            raise refuse(self.path, f"holds {leaf}, not floating-point numbers", "activations are float16 to float64")
        column = table[nested[0]]
        if column.null_count:
            raise refuse(self.path, f"has {column.null_count:,} records without activations", "leave them out")
        return column

    def read(self, start: int, stop: int) -> torch.Tensor:
        d, pieces = self.shape[1], []
        for chunk, first in zip(self._chunks(), self._starts, strict=False):
            low, high = max(start - first, 0), min(stop - first, len(inner := chunk.flatten()))
            if low < high:
                values = inner.slice(low, high - low).flatten()
                pieces.append(values.to_numpy(zero_copy_only=False).reshape(-1, d))
        return torch.from_numpy(np.concatenate(pieces)) if pieces else torch.empty(0, d)

    def close(self) -> None:
        self._column = None


def _leaf(kind: Any) -> tuple[int, Any]:
    """How deep lists are nested in an Arrow type, and of what."""
    depth = 0
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            return depth, kind
        kind, depth = kind.value_type, depth + 1


def data_files(folder: Path, found: list[Path]) -> list[Path]:
    """Of the Arrow files found in a dataset's folder those that are its data, in its own order."""
    state = folder / "state.json"
    if not state.is_file():
        return found
    try:
        files = [folder / Path(entry["filename"]).name for entry in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise refuse(state, f"is not the state of a dataset: {error}", "copy the folder again") from error
    for file in files:
        if not file.is_file():
            raise refuse(state, f"names {file.name}, which is not beside it", "copy the folder again")
    return files
