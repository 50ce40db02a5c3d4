"""Blocks: shuffled rows in LitData's chunk format, written and read by us.

A chunk is a plain matrix behind 12 bytes, `u32le 1 | u32le 12 | u32le 12 + bytes | rows, row-major`: to
LitData's `TokensLoader` one item that is the whole chunk. Unmodified litdata reads the folder, and its
`block_size` (rows times d) is chosen at READ time. `index.json` lists the chunks; under a key of our own,
which litdata passes over, it also says how wide a row is.
"""

from __future__ import annotations

import json
import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.fs import Buffer, FileRecord, Store, join
from plmsae_cli.store.quantise import CALIBRATION, SCALE_BYTES, Quantiser

INDEX_NAME = "index.json"
HEADER_BYTES = 12
MAX_CHUNK_BYTES = 2**32 - 1
"""The header holds the chunk's end as an unsigned 32-bit number."""

# litdata.constants._TORCH_DTYPES_MAPPING, the part that activations need.
_DTYPE_INDEX = {torch.float32: 1, torch.float16: 9, torch.bfloat16: 10, torch.int8: 12}
_FORMATS = {f"no_header_tensor:{index}": dtype for dtype, index in _DTYPE_INDEX.items()}
_OUR_KEY = "plmsae"


def chunk_name(index: int) -> str:
    """The file name of chunk `index`, as litdata itself would call it."""
    return f"chunk-0-{index}.bin"


def chunk_rows(chunk_bytes: int, block_rows: int, d: int, dtype: torch.dtype) -> int:
    """Rows of every chunk but the last: the most whole blocks within `chunk_bytes`, at least one.

    Raises:
        UserError: such a chunk would pass the format's 2^32 - 1 bytes.
    """
    block_bytes = block_rows * d * dtype.itemsize
    rows = max(1, (chunk_bytes - HEADER_BYTES) // block_bytes) * block_rows
    size = HEADER_BYTES + rows * d * dtype.itemsize
    if size <= MAX_CHUNK_BYTES:
        return rows
    if rows == block_rows:
        most = (MAX_CHUNK_BYTES - HEADER_BYTES) // (d * dtype.itemsize)
        raise UserError(
            f"optimize.block_rows = {block_rows} rows of {d} x {dtype.itemsize} bytes make a chunk of"
            f" {size} bytes, the format ends at {MAX_CHUNK_BYTES}",
            hint=f"set optimize.block_rows to at most {most}",
        )
    raise UserError(
        f"optimize.chunk = {chunk_bytes} bytes is more than the format's {MAX_CHUNK_BYTES}",
        hint="set optimize.chunk to 512MB; from 256MB on larger chunks gain nothing",
    )


def write_chunk(store: Store, path: str, rows_RD: torch.Tensor) -> FileRecord:
    """Write rows [R, D], contiguous on the CPU, as the chunk `path`; the rows are not copied."""
    assert rows_RD.ndim == 2, f"rows are [R, D], not {tuple(rows_RD.shape)}"
    assert rows_RD.dtype in _DTYPE_INDEX, f"blocks do not hold {rows_RD.dtype}"
    data = _memory(rows_RD)
    return stream_chunk(store, path, [data], data.nbytes)


def stream_chunk(store: Store, path: str, buffers: Iterable[Buffer], num_bytes: int) -> FileRecord:
    """The same from rows that come piece by piece, `num_bytes` in all."""
    size = HEADER_BYTES + num_bytes
    assert HEADER_BYTES < size <= MAX_CHUNK_BYTES, "chunk_rows() plans chunks that fit"
    return store.write(path, chain([struct.pack("<III", 1, HEADER_BYTES, size)], buffers), size=size)


def index_json(chunks: Sequence[tuple[str, int]], d: int, dtype: torch.dtype, quantised: bool = False) -> bytes:
    """The content of index.json for chunks (name, rows) in the order of their rows.

    `d` is what a row has in the file: of rows that are quantised, their scale's two bytes included.
    It depends on its arguments alone: litdata's `updated_at` is "0", its word for no date.
    """
    row_bytes = d * dtype.itemsize
    listed: list[dict[str, Any]] = [
        {"chunk_bytes": HEADER_BYTES + rows * row_bytes, "chunk_size": 1, "dim": rows * d, "filename": name}
        for name, rows in chunks
    ]
    config = {
        "chunk_bytes": max((chunk["chunk_bytes"] for chunk in listed), default=HEADER_BYTES),
        "chunk_size": None,
        "compression": None,
        "data_format": [f"no_header_tensor:{_DTYPE_INDEX[dtype]}"],
        "data_spec": '[1, {"type": null, "context": null, "children_spec": []}]',
        "encryption": None,
        "item_loader": "TokensLoader",
        "types": "tensor",
    }
    index = {
        "chunks": listed,
        "config": config,
        "updated_at": "0",
        _OUR_KEY: {"d": d, **({"quantised": True} if quantised else {})},
    }
    return json.dumps(index, sort_keys=True).encode()


def write_index(
    store: Store,
    folder: str,
    chunk_names: Sequence[str],
    chunk_rows: Sequence[int],
    d: int,
    dtype: torch.dtype,
) -> FileRecord:
    """Write `folder/index.json`; the folder counts as readable from then on, so write it after the chunks."""
    chunks = list(zip(chunk_names, chunk_rows, strict=True))
    return store.write(join(folder, INDEX_NAME), [index_json(chunks, d, dtype)])


class Blocks:
    """A folder of chunks, read by ranges of rows. Picklable; threads may share it.

    Attributes:
        num_rows: rows in all chunks (`n` is the same).
        width: elements of a row as stored; of quantised rows d + 2 bytes.
        d: dimensions of the activations: the width, less the scale of quantised rows.
        quantised: whether rows are int8 with their scale; `decode` makes numbers of them.
        dtype: torch.bfloat16, float16, float32 or int8.

    Raises:
        UserError: no index.json, or one whose data are not plain rows: another item loader or data format
            (pickle among them), compression, encryption, several items a chunk. The message names it.
    """

    def __init__(self, store: Store, folder: str) -> None:
        self.store = store
        self.folder = folder
        path = join(folder, INDEX_NAME)
        try:
            text = store.read(path)
        except FileNotFoundError as error:
            raise UserError(f"{folder} has no {INDEX_NAME}", hint="run the optimize stage that writes it") from error
        try:
            index = json.loads(text)
            self.dtype = _plain_dtype(index["config"], path)
            self.width = _row_width(index, path)
            self.quantised = bool(index[_OUR_KEY].get("quantised"))
            self.d = self.width - (SCALE_BYTES if self.quantised else 0)
            rows = [_num_rows(chunk, self.width, self.dtype, path) for chunk in index["chunks"]]
            self._paths = [join(folder, chunk["filename"]) for chunk in index["chunks"]]
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is not an index of LitData chunks: {error!r}") from error
        self._ends = list(accumulate(rows))
        self.num_rows = self._ends[-1] if rows else 0

    @property
    def n(self) -> int:
        return self.num_rows

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as stored, a new CPU tensor [stop - start, width]."""
        out_RD = torch.empty(stop - start, self.width, dtype=self.dtype)
        self.read_into(start, out_RD)
        return out_RD

    @cached_property
    def quantiser(self) -> Quantiser | None:
        """What decodes the rows; None where they are plain numbers."""
        return Quantiser.read(self.store, join(self.folder, CALIBRATION)) if self.quantised else None

    def decode(self, rows_RW: torch.Tensor) -> torch.Tensor:
        """Rows as stored, on any device -> float32 [R, d] there."""
        if self.quantiser is None:
            return rows_RW.float()
        return self.quantiser.to(rows_RW.device).decode(rows_RW)

    def place(self, row: int) -> int:
        """Where in its chunk the bytes of a row begin."""
        chunk = bisect_right(self._ends, row)
        return HEADER_BYTES + (row - (self._ends[chunk - 1] if chunk else 0)) * self.width * self.dtype.itemsize

    def read_into(self, row_start: int, out_RD: torch.Tensor) -> None:
        """Fill `out_RD`, contiguous on the CPU, with the rows from `row_start`, across chunks where need be.

        Raises:
            StoreError: a chunk is missing or too short; the message names it.
            UserError: there are no such rows.
        """
        num_rows = out_RD.shape[0]
        assert out_RD.dtype == self.dtype, f"{out_RD.dtype} is not {self.dtype}"
        assert out_RD.shape == (num_rows, self.width), f"{tuple(out_RD.shape)} is not [R, {self.width}]"
        if not 0 <= row_start <= row_start + num_rows <= self.num_rows:
            raise UserError(f"{self.folder} has {self.num_rows} rows, not {row_start} to {row_start + num_rows}")
        if num_rows == 0:
            return
        buffer = _memory(out_RD)
        row_bytes = self.width * self.dtype.itemsize
        chunk, done = bisect_right(self._ends, row_start), 0
        while done < num_rows:
            row = row_start + done
            count = min(self._ends[chunk] - row, num_rows - done)
            piece = buffer[done * row_bytes : (done + count) * row_bytes]
            self.store.read_into(self._paths[chunk], self.place(row), piece)
            done += count
            chunk += 1


def _memory(rows_RD: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor; numpy has no bfloat16, but any tensor is bytes."""
    return rows_RD.detach().view(-1).view(torch.uint8).numpy().data


def _plain_dtype(config: dict[str, Any], path: str) -> torch.dtype:
    found = [f"{field} {config[field]!r}" for field in ("compression", "encryption") if config.get(field)]
    if config.get("item_loader") != "TokensLoader":
        found.append(f"item_loader {config.get('item_loader')!r}")
    dtype = _FORMATS.get(",".join(config["data_format"]))
    if dtype is None:
        found.append(f"data_format {config['data_format']!r}")
    if dtype is None or found:
        raise _refused(path, ", ".join(found))
    return dtype


def _row_width(index: dict[str, Any], path: str) -> int:
    if _OUR_KEY not in index:
        raise UserError(
            f"{path} does not say how wide a row is: it was not written by plmsae",
            hint="LitData's own index knows tokens, not rows; write the dataset with the optimize stage",
        )
    d = int(index[_OUR_KEY]["d"])
    if d < 1:
        raise ValueError(f"d = {d}")
    return d


def _num_rows(chunk: dict[str, Any], d: int, dtype: torch.dtype, path: str) -> int:
    if chunk["chunk_size"] != 1:
        raise _refused(path, f"{chunk['chunk_size']} items in {chunk['filename']}")
    rows, rest = divmod(int(chunk["dim"]), d)
    if rest or rows < 1 or chunk["chunk_bytes"] != HEADER_BYTES + rows * d * dtype.itemsize:
        raise ValueError(f"{chunk['filename']} is not a matrix of rows of {d} elements")
    return rows


def _refused(path: str, found: str) -> UserError:
    return UserError(
        f"{path} describes chunks that are not plain rows: {found}",
        hint="blocks are plain TokensLoader tensors of float32, float16, bfloat16 or int8",
    )
