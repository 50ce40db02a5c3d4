"""One file from the web to the disk: whole or not at all, and after a cut on from where it was."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock

from plmsae_cli.config.errors import UserError

Progress = Callable[[int, int | None], None]
"""Called often with the bytes so far and in all; None where the server does not say."""

ATTEMPTS = 5
PAUSE_S = 1.0
"""Before the second attempt; twice as long before each further one."""
_CHUNK = 1 << 20
_TIMEOUT = 30.0
"""Seconds without a byte before a connection counts as dead."""
_BUSY = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Checksum:
    """What the publisher says the file hashes to, in hex."""

    kind: Literal["md5", "sha256"]
    value: str


def download(
    url: str,
    target: Path,
    progress: Progress | None = None,
    size: int | None = None,
    checksum: Checksum | None = None,
) -> None:
    """Fetch `url` into `target`, unless it is there.

    What came before a cut stays beside it as `.NAME.part`, where the server says by which mark (ETag, Last-Modified) the
    rest can be asked for; a file that changed meanwhile is begun anew. Of several processes that want the same file one
    fetches it and the others wait.

    Args:
        size: bytes that the publisher states; another size is an error.
        checksum: likewise for the content.

    Raises:
        UserError: anything that goes wrong, with the URL and the reason; `target` is then absent.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.exists():
                _Transfer(url, target, progress, size).run(checksum)
    except UserError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"{url} could not be downloaded: {error}") from error


def length(url: str) -> int | None:
    """Bytes of what is at `url`, None where the server does not say. Raises UserError as `download` does."""
    request = urllib.request.Request(url, method="HEAD", headers={"Accept-Encoding": "identity"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as reply:
            found = reply.headers.get("Content-Length")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"{url} does not answer: {error}") from error
    return None if found is None else int(found)


class _Cut(OSError):
    """Worth another attempt."""


class _Transfer:
    def __init__(self, url: str, target: Path, progress: Progress | None, size: int | None) -> None:
        self.url, self.target, self.size = url, target, size
        self.progress = progress or (lambda done, total: None)
        self.part = target.with_name(f".{target.name}.part")
        self.card = target.with_name(f".{target.name}.part.json")
        self.answered = False

    def run(self, checksum: Checksum | None) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._attempt()
                break
            except (http.client.HTTPException, OSError) as error:
                if attempt == ATTEMPTS or not self._passing(error):
                    raise
                time.sleep(PAUSE_S * 2 ** (attempt - 1))
        self._check(checksum)
        os.replace(self.part, self.target)
        self.card.unlink(missing_ok=True)

    def _passing(self, error: Exception) -> bool:
        """Whether another attempt may go better: a line that broke or a busy server, not a full disk or a wrong address."""
        if isinstance(error, urllib.error.HTTPError):
            return error.code in _BUSY
        if isinstance(error, urllib.error.URLError):
            return self.answered
        network = isinstance(error, _Cut | http.client.HTTPException | ConnectionError | TimeoutError)
        return network or not isinstance(error, OSError) or error.errno is None

    def _attempt(self) -> None:
        """Ask for what is missing; returns when the part is whole."""
        mark = self._mark()
        done = self.part.stat().st_size if mark is not None else 0
        headers = {"Accept-Encoding": "identity"}
        if mark is not None:
            headers |= {"Range": f"bytes={done}-", "If-Range": mark}
        try:
            reply = urllib.request.urlopen(urllib.request.Request(self.url, headers=headers), timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and mark is not None:
                whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range") or "")
                if whole is not None and int(whole[1]) == done:
                    return  # killed between the last byte and the renaming
                self._forget()
                raise _Cut("the file has changed") from error
            raise
        self.answered = True
        with reply:
            if reply.status != http.HTTPStatus.PARTIAL_CONTENT:
                done = 0
            elif not (reply.headers.get("Content-Range") or "").startswith(f"bytes {done}-"):
                self._forget()
                raise _Cut("the server sent another part than was asked for")
            left = reply.headers.get("Content-Length")
            total = None if left is None else done + int(left)
            if self.size is not None and total is not None and total != self.size:
                self._forget()
                raise UserError(f"{self.url} has {total:,} bytes, {self.size:,} are published")
            if not done:
                self._forget()  # before the new mark, which what came of an earlier file must never stand under
            keepable = self._remember(reply.headers.get("ETag"), reply.headers.get("Last-Modified"))
            try:
                self._receive(reply, done, total)
            except BaseException:
                if not keepable:
                    self._forget()
                raise

    def _receive(self, reply: http.client.HTTPResponse, done: int, total: int | None) -> None:
        with self.part.open("ab" if done else "wb") as file:
            self.progress(done, total)
            while chunk := reply.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                self.progress(done, total)
            file.flush()
            os.fsync(file.fileno())
        if total is not None and done != total:
            raise _Cut(f"the connection closed after {done:,} of {total:,} bytes")

    def _check(self, checksum: Checksum | None) -> None:
        found = self.part.stat().st_size
        if self.size is not None and found != self.size:
            self._forget()
            raise UserError(f"{self.url} gave {found:,} bytes, {self.size:,} are published")
        if checksum is None:
            return
        with self.part.open("rb") as file:
            value = hashlib.file_digest(file, checksum.kind).hexdigest()
        if value != checksum.value.lower():
            self._forget()
            raise UserError(
                f"{self.url} is not what was published: {checksum.kind} {value}, published {checksum.value}",
                "start again; if it stays so, the mirror or a proxy gives another file",
            )

    def _mark(self) -> str | None:
        """By what the server knows the file that the part is of."""
        try:
            card = json.loads(self.card.read_text(encoding="utf-8"))
            return str(card["mark"]) if card["url"] == self.url and self.part.is_file() else None
        except (OSError, ValueError, KeyError):
            return None

    def _remember(self, etag: str | None, modified: str | None) -> bool:
        mark = etag if etag is not None and not etag.startswith("W/") else modified
        if mark is None:
            self.card.unlink(missing_ok=True)
            return False
        self.card.write_text(json.dumps({"url": self.url, "mark": mark}), encoding="utf-8")
        return True

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.card.unlink(missing_ok=True)
