"""Parquet files of a store as Arrow tables."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from plmsae_cli.store.fs import Store

if TYPE_CHECKING:
    import pyarrow as pa


def read_table(store: Store, path: str) -> pa.Table:
    """The whole file.

    On the thread of the caller alone: a thread of Arrow that lets go of a Python object while the interpreter ends
    aborts the process ("terminate called without an active exception"), on a busy machine one in sixty.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(io.BytesIO(store.read(path)), pre_buffer=False) as file:
        return file.read(use_threads=False)
