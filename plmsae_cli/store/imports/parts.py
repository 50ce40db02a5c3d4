"""One file of foreign activations as a matrix: its shape is known at once, its rows are read by ranges.

R: rows of a read. D: dimensions of a row. C: documents of a file, stretches of rows that belong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.fs import Store, StoreError
from plmsae_cli.store.pickles import read_pickle
from plmsae_cli.store.tensorfile import TensorFile


@dataclass(frozen=True, eq=False)
class Documents:
    """Which rows of a file belong together, in order and without gaps."""

    lengths_C: npt.NDArray[np.int32]
    names: Sequence[str] | None
    """Ids of proteins; None where they are not proteins that the file names."""


class Part(Protocol):
    """A file of rows."""

    @property
    def path(self) -> Path: ...
    @property
    def shape(self) -> tuple[int, int]:
        """Rows and dimensions."""

    @property
    def documents(self) -> Documents | None:
        """None where the file does not say."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as they are stored, [R, D], on the CPU; may be a view of the mapped file."""

    def close(self) -> None:
        """Let go of what reading has opened."""


def refuse(path: Path, problem: str, hint: str) -> UserError:
    return UserError(f"embed.imported: {path} {problem}", hint)


def matrix_shape(path: Path, shape: Sequence[int], floating: bool, dtype: object, what: str = "") -> tuple[int, int]:
    """Rows and dimensions of floating-point rows. Raises UserError for anything else."""
    label = f"{what} " if what else ""
    if not floating:
        raise refuse(path, f"holds {label}{dtype}, not floating-point numbers", "activations are float16 to float64")
    if len(shape) != 2:
        raise refuse(
            path, f"holds {label}{list(shape)}, not a matrix [rows, width]", "flatten proteins into rows first"
        )
    rows, d = (int(extent) for extent in shape)
    if d < 1:
        raise refuse(path, f"holds {label}rows of no width", "is it the right file?")
    return rows, d


class NpyPart:
    """A `.npy` matrix, mapped: never whole in memory."""

    documents = None

    def __init__(self, path: Path) -> None:
        self.path = path
        array = self._map()
        self.shape = matrix_shape(path, array.shape, array.dtype.kind == "f" and array.dtype.itemsize <= 8, array.dtype)

    def _map(self) -> npt.NDArray[Any]:
        try:
            mapped: npt.NDArray[Any] = np.lib.format.open_memmap(self.path, mode="r")
            return mapped
        except (ValueError, EOFError, OSError) as error:
            kind = "holds Python objects" if "Python objects" in str(error) else "is not a sound .npy file"
            raise refuse(self.path, f"{kind}: {error}", "save the matrix itself, with numpy.save") from error

    def read(self, start: int, stop: int) -> torch.Tensor:
        rows_RD = self._map()[start:stop]
        return torch.from_numpy(np.array(rows_RD, dtype=rows_RD.dtype.newbyteorder("="), order="C"))

    def close(self) -> None:
        """Nothing stays open."""


class SafetensorsPart:
    """A `.safetensors` file with one matrix."""

    documents = None

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = TensorFile(Store(), str(path))
        except StoreError as error:
            raise refuse(
                path, f"cannot be read: {error.message}", "copy it again; rows are F64, F32, F16 or BF16"
            ) from error
        names = self._file.names()
        if len(names) != 1:
            listed = ", ".join(names[:8]) or "none"
            raise refuse(path, f"has {len(names)} tensors ({listed}), not one", "one matrix [rows, width] a file")
        self._name = names[0]
        dtype = self._file.dtype(self._name)
        self.shape = matrix_shape(path, self._file.shape(self._name), dtype.is_floating_point, dtype)

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self._file.read(self._name, start, stop)

    def close(self) -> None:
        """Nothing stays open."""


class TorchPart:
    """What `torch.save` wrote: a matrix, or a dict with `embeddings` and perhaps `boundaries` and `protein_ids`.

    Read by torch's restricted unpickler, mapped where the file's layout allows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows_RD: torch.Tensor | None = None
        data = read_pickle(path, ())
        matrix = data.get("embeddings") if isinstance(data, dict) else data
        if not isinstance(matrix, torch.Tensor):
            raise refuse(path, "holds no matrix", "a tensor, or a dict with the tensor `embeddings`")
        self.shape = matrix_shape(path, matrix.shape, matrix.dtype.is_floating_point, matrix.dtype)
        self.documents = _boundaries(path, data, self.shape[0]) if isinstance(data, dict) else None

    def read(self, start: int, stop: int) -> torch.Tensor:
        if self._rows_RD is None:
            data = read_pickle(self.path, ())
            self._rows_RD = data["embeddings"] if isinstance(data, dict) else data
        return self._rows_RD[start:stop]

    def close(self) -> None:
        self._rows_RD = None


def _boundaries(path: Path, data: dict[str, Any], rows: int) -> Documents | None:
    """`boundaries`: (start, stop) of each protein; they must tile the rows."""
    if data.get("boundaries") is None:
        return None
    wrong = refuse(path, f"has boundaries that do not tile its {rows:,} rows", "(start, stop) a protein, in order")
    try:
        ends_C2 = np.asarray([(int(start), int(stop)) for start, stop in data["boundaries"]], np.int64).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise wrong from error
    stops_C = ends_C2[:, 1]
    if not np.array_equal(ends_C2[:, 0], np.concatenate(([0], stops_C))[:-1]) or (ends_C2[:, 0] > stops_C).any():
        raise wrong
    if (int(stops_C[-1]) if len(stops_C) else 0) != rows:
        raise wrong
    names = data.get("protein_ids")
    if names is not None and len(names) != len(stops_C):
        raise refuse(path, f"has {len(names):,} protein_ids and {len(stops_C):,} boundaries", "one id a protein")
    ids = None if names is None else [str(name) for name in names]
    return Documents((stops_C - ends_C2[:, 0]).astype(np.int32), ids)


class RawPart:
    """A matrix of float16 without a header (InterPLM's `.dat`), of the size its metadata state; mapped."""

    documents = None

    def __init__(self, path: Path, rows: int, d: int) -> None:
        self.path, self.shape = path, (rows, d)
        size = path.stat().st_size
        if size != 2 * rows * d:
            hint = "InterPLM's .dat files are float16; the file was cut, or its metadata are another's"
            raise refuse(path, f"has {size:,} bytes, its metadata say {rows:,} rows of {d} float16", hint)

    def read(self, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(np.array(np.memmap(self.path, "<f2", "r", shape=self.shape)[start:stop]))

    def close(self) -> None:
        """Nothing stays open."""
