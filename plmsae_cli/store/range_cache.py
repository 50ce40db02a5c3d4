"""Ranges of S3 objects kept on a local disk: what several epochs and several trainers read, the link carries once.

One file a range, named by the object's address, its etag, start and length; behind the bytes their xxh3-128, so that a file cut
short by a crash, or flipped by the disk, is fetched again. Processes share a folder: files appear by a rename, and of
several that lack the same range one fetches it while the others wait for its file.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from plmsae_cli.store.fs import Store, is_remote

if TYPE_CHECKING:
    from plmsae_cli.config.experiment import Storage
    from plmsae_cli.store.s3 import S3Objects

_DIGEST_BYTES = 16
_STRIPES = 1024
"""Locks that ranges share by their names."""


class CachingStore(Store):
    """A Store whose `read_into` of remote files goes through a folder; everything else is the Store's own.

    The order of reading makes "keep the newest" useless (an epoch would push out what the next one needs), so a full cache
    keeps what it has; only ranges that nobody has read since this process started make room.

    Args:
        folder: a local folder, made when first needed; best on an NVMe disk.
        limit: most bytes in it.
    """

    def __init__(self, storage: Storage | None, folder: str, limit: int) -> None:
        super().__init__(storage)
        self._folder, self._limit = Path(folder).expanduser(), limit
        self._etags: dict[str, str] = {}
        self._begun = time.time()
        self._full = False
        self._threads = [threading.Lock() for _ in range(_STRIPES)]
        self.hits = self.misses = 0
        """Ranges found and ranges fetched, by this process."""

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        view = buffer.cast("B")
        if not is_remote(path) or not view.nbytes:
            super().read_into(path, start, buffer)
            return
        file = self._file(path, start, view.nbytes)
        if self._load(file, view):
            return
        with self._one_at_a_time(file.name):
            if self._load(file, view):  # somebody fetched it meanwhile
                return
            self._objects(path).read_into(path, start, view, self._etags[path])
            self.misses += 1
            self._keep(file, view)

    def _file(self, path: str, start: int, length: int) -> Path:
        if path not in self._etags:
            self._etags[path] = self._objects(path).etag(path)
        name = hashlib.sha256(f"{path} {self._etags[path]} {start} {length}".encode()).hexdigest()[:40]
        return self._folder / name[:2] / name

    def _objects(self, path: str) -> S3Objects:
        from plmsae_cli.store.s3 import S3Objects

        found = self._at(path)
        assert isinstance(found, S3Objects)
        return found

    def _load(self, file: Path, view: memoryview) -> bool:
        """Fill `view` from the file; false if it is absent or not what was written."""
        digest = bytearray(_DIGEST_BYTES)
        try:
            with file.open("rb", buffering=0) as opened:
                got = os.preadv(opened.fileno(), [view, digest], 0)
        except OSError:
            return False
        if got != view.nbytes + _DIGEST_BYTES or xxhash.xxh3_128_digest(view) != digest:
            return False
        with suppress(OSError):
            os.utime(file)
        self.hits += 1
        return True

    def _keep(self, file: Path, view: memoryview) -> None:
        """Write the range if there is room. A cache that cannot be written is only slow, so no error leaves here."""
        size = view.nbytes + _DIGEST_BYTES
        temporary = file.parent / f".{file.name}.{secrets.token_hex(4)}.tmp"
        try:
            if self._full or not self._reserve(size):
                return
            file.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb", buffering=0) as opened:
                written = os.writev(opened.fileno(), [view, xxhash.xxh3_128_digest(view)])
            if written == size:
                os.replace(temporary, file)
            else:
                temporary.unlink()
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._full = True

    def _reserve(self, size: int) -> bool:
        """Count the bytes in; makes room at the cost of what nobody has read of late."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._locked("usage.lock"):
            usage = self._folder / "usage"
            try:
                used = int(usage.read_text())
            except (OSError, ValueError):
                used = self._count()
            if used + size > self._limit:
                used = self._make_room(self._limit - size)
                if used + size > self._limit:
                    self._full = True
                    return False
            usage.write_text(str(used + size))
            return True

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for file in self._folder.glob("??/*"):
            with suppress(OSError):
                yield file, file.stat()

    def _count(self) -> int:
        return sum(found.st_size for _, found in self._files())

    def _make_room(self, most: int) -> int:
        """Remove ranges unread since this process began, the longest unread first, until `most` bytes are left."""
        found = sorted(self._files(), key=lambda pair: pair[1].st_mtime)
        left = sum(status.st_size for _, status in found)
        for file, status in found:
            if left <= most or status.st_mtime >= self._begun:
                break
            file.unlink(missing_ok=True)
            left -= status.st_size
        return left

    @contextmanager
    def _one_at_a_time(self, name: str) -> Iterator[None]:
        stripe = int(name[:8], 16) % _STRIPES
        with self._threads[stripe], ExitStack() as held:
            if not self._full:  # else nothing will be kept, so nobody need wait
                try:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    held.enter_context(self._locked(f"fetch-{stripe}.lock"))
                except OSError:  # another user's, full, or on a disk that cannot lock
                    self._full = True
            yield

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self._folder / name).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
