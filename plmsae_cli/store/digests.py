"""Hashes of large files, computed once."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path


def remembered_sha256(path: Path, cache: Path) -> str:
    """The file's sha256, remembered by path, size and time of change."""
    path = path.resolve()
    status = path.stat()
    facts = {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    note = cache / "sha256" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):
        known = json.loads(note.read_bytes())
        if known["facts"] == facts:
            return str(known["sha256"])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # A cache that cannot be written costs time, not the run.
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        part = note.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"facts": facts, "sha256": digest}))
        os.replace(part, note)
    return digest
