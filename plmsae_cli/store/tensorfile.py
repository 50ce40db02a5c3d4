"""Tensors in files of the safetensors format, read by ranges of rows from a disk or from S3.

Format: eight bytes, little-endian, the header's length; the header, JSON padded with blanks; the data.
The header gives each tensor its dtype, shape and place: `{"name": {"dtype": "F32", "shape": [2, 3],
"data_offsets": [0, 24]}, "__metadata__": {"key": "text"}}`.
Our own reader and writer, because rows must come by ranges and bytes go between tensors and files uncopied.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from plmsae_cli.store.fs import Buffer, DamagedError, FileRecord, Store, StoreError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FIRST_READ = 64 << 10
"""Bytes read at once on opening; most headers fit, so most files open with one request."""
_LONGEST_HEADER = 100_000_000


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def _whole(number: object) -> int:
    if type(number) is not int:
        raise TypeError(f"{number!r} is not a whole number")
    return number


@dataclass(frozen=True)
class Streamed:
    """A tensor that comes in pieces while it is written, so that it is never whole in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    buffers: Iterable[Buffer]

    def numel(self) -> int:
        return math.prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize


def write_tensors(
    store: Store, path: str, tensors: Mapping[str, torch.Tensor | Streamed], metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write `tensors` and `metadata` to `path`, atomically; contiguous CPU tensors are not copied."""
    # Widest elements first: each tensor then starts at a multiple of its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name in order:
        tensor = tensors[name]
        end = place + tensor.numel() * tensor.element_size()
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        header[name] = entry
        place = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def buffers() -> Iterator[Buffer]:
        yield len(text).to_bytes(8, "little") + text
        for name in order:
            tensor = tensors[name]
            if isinstance(tensor, Streamed):
                yield from tensor.buffers
            else:
                yield _bytes_of(tensor.detach().to("cpu").contiguous())

    return store.write(path, buffers(), size=8 + len(text) + place)


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Of the data, in bytes from the beginning of the file."""


class TensorFile:
    """A safetensors file, opened: the header is read and checked, the data only when asked for.

    A header that is damaged, or does not fit the file's size, is a DamagedError naming the file.
    """

    def __init__(self, store: Store, path: str) -> None:
        self._store = store
        self.path = path
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, _Entry] = {}
        try:
            self._parse(store.size(path))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            if isinstance(error, StoreError):
                raise
            raise DamagedError(
                f"{path} is not a sound safetensors file: {error}",
                hint="it is damaged or of another kind; delete it to have it made again",
            ) from error

    def _parse(self, size: int) -> None:
        """Read the header; whatever is wrong with it ends in one of the errors caught above."""
        head = self._store.read(self.path, 0, min(size, _FIRST_READ))
        length = int.from_bytes(head[:8], "little")
        data = 8 + length
        if len(head) < 8 or length > _LONGEST_HEADER or data > size:
            raise ValueError(f"its header would end at byte {data} of {size}")
        if data > len(head):
            head += self._store.read(self.path, len(head), data - len(head))
        header = json.loads(head[8:data])
        end_of_all = data
        for name, fields in header.items():
            if name == "__metadata__":
                self.metadata = {str(key): str(value) for key, value in fields.items()}
                continue
            dtype = _DTYPES[fields["dtype"]]
            shape = tuple(_whole(extent) for extent in fields["shape"])
            first, end = (_whole(offset) for offset in fields["data_offsets"])
            num_bytes = math.prod(shape) * dtype.itemsize
            if min(shape, default=0) < 0 or first < 0 or end - first != num_bytes:
                raise ValueError(f"tensor {name!r} has shape {list(shape)} but bytes {first} to {end}")
            self._entries[name] = _Entry(dtype, shape, data + first)
            end_of_all = max(end_of_all, data + end)
        if end_of_all != size:
            raise ValueError(f"its tensors end at byte {end_of_all} of {size}")

    def names(self) -> list[str]:
        """Names of the tensors, as ordered in the header."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of the tensor, by default all; a new CPU tensor."""
        entry = self._entry(name)
        if start == 0 and stop is None:
            shape = entry.shape
        else:
            stop = entry.shape[0] if stop is None else stop
            shape = (stop - start, *entry.shape[1:])
        out = torch.empty(shape, dtype=entry.dtype)
        self.read_into(name, out, start)
        return out

    def read_into(self, name: str, out: torch.Tensor, start: int = 0) -> None:
        """Fill `out`, contiguous on the CPU, with the rows from `start`; local bytes go straight into it."""
        entry = self._entry(name)
        rows = entry.shape[:1] or (1,)
        wanted = out.shape[:1] or (1,)
        if out.dtype != entry.dtype or out.shape[1:] != entry.shape[1:] or out.ndim != len(entry.shape):
            raise StoreError(
                f"{self.path}: {name} is {_NAMES[entry.dtype]} {list(entry.shape)}, which does not fill"
                f" {_NAMES.get(out.dtype, out.dtype)} {list(out.shape)}"
            )
        if not 0 <= start <= start + wanted[0] <= rows[0]:
            raise StoreError(f"{self.path}: {name} has {rows[0]} rows, not {start} to {start + wanted[0]}")
        assert out.is_contiguous(), "out must be contiguous"
        if out.numel():
            self._store.read_into(self.path, self.place(name, start), _bytes_of(out))

    def place(self, name: str, row: int) -> int:
        """Where in the file the bytes of a row begin."""
        entry = self._entry(name)
        return entry.start + row * math.prod(entry.shape[1:]) * entry.dtype.itemsize

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """Have the disk read rows [start, stop) ahead."""
        first = self.place(name, start)
        self._store.prefetch(self.path, first, self.place(name, stop) - first)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            known = ", ".join(self._entries) or "none"
            raise StoreError(f"{self.path} has no tensor {name!r}; it has {known}")
        return self._entries[name]
