"""What the store says about a file: the record of what was written, and the errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from plmsae_cli.config.errors import UserError

Buffer = bytes | bytearray | memoryview
"""What `Store.write` takes: anything contiguous; its bytes are written as they lie in memory."""


class StoreError(UserError):
    """A file cannot be read or written, or is not what it should be; the message names it."""


class MissingError(StoreError, FileNotFoundError):
    """The file is not there. Also a FileNotFoundError, so that callers who expect it can say so."""


class DamagedError(StoreError):
    """The file is there, but its content is not what it must be."""


@dataclass(frozen=True)
class FileRecord:
    """One written file: its name, its size in bytes, and the xxh3-128 of its content in hex."""

    name: str
    size: int
    xxh3: str


def is_temporary(name: str) -> bool:
    """Whether a file of this base name is one that a write had not finished."""
    return name.startswith(".") and name.endswith(".tmp")


def flat(buffers: Iterable[Buffer]) -> Iterator[memoryview]:
    """The bytes of each buffer that has any, uncopied."""
    for buffer in buffers:
        view = memoryview(buffer)
        if view.nbytes:  # cast() refuses a shape with a zero in it
            yield view.cast("B")
