"""One file from the web to the disk: whole or not at all."""

from __future__ import annotations

import http.client
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from plmsae_cli.config.errors import UserError

_CHUNK = 1 << 20
_TIMEOUT = 30.0
"""Seconds without a byte before a connection counts as dead."""


def download(url: str, target: Path, progress: Callable[[int, int | None], None] | None = None) -> None:
    """Fetch `url` into `target`, unless it is there; `progress(bytes so far, bytes in all or None)` is called
    often.

    Of several processes that want the same file one fetches it and the others wait. Raises UserError for
    anything that goes wrong, with the URL and the reason; `target` is then absent.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.exists():
                _fetch(url, target, progress)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"{url} could not be downloaded: {error}") from error


def _fetch(url: str, target: Path, progress: Callable[[int, int | None], None] | None) -> None:
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as reply, part.open("wb") as file:
            length = reply.headers.get("Content-Length")
            total = None if length is None else int(length)
            done = 0
            while chunk := reply.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
            if total is not None and done != total:
                raise OSError(f"the connection closed after {done:,} of {total:,} bytes")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
