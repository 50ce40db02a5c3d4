"""A checksum of rows that does not depend on their order: what a shuffle must leave as it is.

The exclusive or of all rows, folded to 64 bits. Any single flipped bit shows, a zeroed or repeated stretch all but
surely; equal for any grouping of the same rows into files and tasks.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Bytes2D = npt.NDArray[np.uint8]


def row_sum(rows_RW: Bytes2D) -> int:
    """Of rows as bytes, [R, width]."""
    num_rows, width = rows_RW.shape
    if width % 8 == 0:  # word by word, whatever row and column: the same sum in half the time
        return int(np.bitwise_xor.reduce(rows_RW.reshape(-1).view("<u8"), initial=0))
    word = next(size for size in (4, 2, 1) if width % size == 0)
    column = np.bitwise_xor.reduce(rows_RW.view(f"u{word}"), axis=0, initial=0) if num_rows else np.zeros(0, np.uint8)
    folded = column.tobytes()
    folded += bytes(-len(folded) % 8)
    return int(np.bitwise_xor.reduce(np.frombuffer(folded, "<u8"), initial=0))


def hexed(value: int) -> str:
    """As part records and manifests have it."""
    return f"{value:016x}"


def joined(sums: Iterable[str]) -> str:
    """The sum of all rows from those of their parts."""
    value = 0
    for one in sums:
        value ^= int(one, 16)
    return hexed(value)
