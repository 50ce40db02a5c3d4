"""Hashes of large files, computed once."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import xxhash

from plmsae_cli.store.fs import Store, StoreError

_PIECE = 4 << 20


def remembered_sha256(path: Path, cache: Path) -> str:
    """The file's sha256, remembered by path, size and time of change."""
    return _remembered(path, cache, "sha256", lambda file: hashlib.file_digest(file, "sha256").hexdigest())


def remembered_xxh3(path: Path, cache: Path) -> str:
    """The file's xxh3 (128 bits), remembered likewise: as fast as the disk reads."""

    def digest(file: io.BufferedReader) -> str:
        state = xxhash.xxh3_128()
        while piece := file.read(_PIECE):
            state.update(piece)
        return str(state.hexdigest())

    return _remembered(path, cache, "xxh3", digest)


def _remembered(path: Path, cache: Path, kind: str, digest: Callable[[io.BufferedReader], str]) -> str:
    path = path.resolve()
    facts = _facts(path)
    note = cache / kind / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):
        known = json.loads(note.read_bytes())
        if known["facts"] == facts:
            return str(known[kind])
    with path.open("rb") as file:
        found = digest(file)
    if _facts(path) == facts:  # else it was written to meanwhile
        with suppress(StoreError):  # a cache that cannot be written costs time, not the run
            Store().write(str(note), [json.dumps({"facts": facts, kind: found}).encode()])
    return found


def _facts(path: Path) -> dict[str, str | int]:
    status = path.stat()
    return {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
