"""Local folders and S3 buckets as one: the only module through which the package touches artifacts.

A path is a local path (`~` is expanded) or `s3://bucket/key`; both join names with `/`. Writes are atomic
and durable: a reader sees the old content or the new, never a part of either, and when `write` returns the
bytes are on the disk (fsync) or held by the server (their size read back).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from plmsae_cli.store.local import LocalFiles
from plmsae_cli.store.records import Buffer, DamagedError, FileRecord, MissingError, StoreError

if TYPE_CHECKING:
    from plmsae_cli.config.experiment import Storage
    from plmsae_cli.store.s3 import S3Objects
    from plmsae_cli.store.s3_uploads import Upload

__all__ = [
    "Buffer",
    "DamagedError",
    "FileRecord",
    "MissingError",
    "Store",
    "StoreError",
    "each",
    "is_remote",
    "join",
]

_REQUESTS = 16
"""Pieces or small objects of one caller that are fetched from S3 at a time."""
_T = TypeVar("_T")
_R = TypeVar("_R")


def is_remote(path: str) -> bool:
    """Whether `path` names an object or a prefix in S3."""
    return path.startswith("s3://")


def join(folder: str, *names: str) -> str:
    """`folder/name/...`, for local paths and S3 alike.

    Names come from manifests too, which others may have written: a name that would leave the folder
    (absolute, or with a `..` in it) is refused with a DamagedError.
    """
    for name in names:
        parts = name.split("/")
        if name.startswith("~") or any(part in ("", ".", "..") for part in parts):
            raise DamagedError(
                f"{name!r} is not a name inside {folder}",
                hint="a file's name is relative, without empty parts, '.' or '..'; is the manifest damaged?",
            )
    if not names:
        return folder
    head = folder if folder in ("", "/") or folder.endswith("://") else folder.rstrip("/") + "/"
    return head + "/".join(names)


def each(folder: str, function: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    """`[function(item) ...]`, many at a time where each one is a request, as it is for a `folder` in S3."""
    listed = list(items)
    if not is_remote(folder) or len(listed) < 2:
        return [function(item) for item in listed]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(function, listed))


class _Files(Protocol):
    """What a kind of storage can do; the methods of `Store`, one for one."""

    def exists(self, path: str) -> bool: ...
    def size(self, path: str) -> int: ...
    def read(self, path: str, start: int, length: int | None) -> bytes: ...
    def read_into(self, path: str, start: int, buffer: memoryview) -> None: ...
    def hash(self, path: str) -> FileRecord: ...
    def write(self, path: str, buffers: Iterable[Buffer], size: int | None) -> FileRecord: ...
    def write_once(self, path: str, data: bytes) -> bool: ...
    def list(self, folder: str) -> dict[str, int]: ...
    def delete(self, path: str) -> None: ...
    def local(self, path: str) -> Path: ...
    def probe(self, folder: str, write: bool) -> None: ...


class Store:
    """Reads and writes files by path, wherever they are.

    It pickles (settings only), so it can be sent to spawned workers; S3 clients are made on first use in each
    process. The S3 client is not fork-safe: a process that has used it must start workers by spawn, and a
    forked child that touches S3 fails at once rather than hang. Threads may share one Store.

    An absent file is a MissingError (a FileNotFoundError) in `size`, `read`, `read_into`, `hash` and `local`,
    one that ends too early a DamagedError; these and every other failure are StoreErrors that name the file.
    """

    def __init__(self, storage: Storage | None = None) -> None:
        self._storage = storage
        self._local = LocalFiles()
        self._s3: S3Objects | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_storage": self._storage, "_local": self._local, "_s3": None}

    def _at(self, path: str) -> _Files:
        if not is_remote(path):
            scheme, found, _ = path.partition("://")
            if found:
                raise StoreError(f"{path}: {scheme}:// is not supported", hint="use a local path or s3://bucket/...")
            return self._local
        return self._bucket()

    def _bucket(self) -> S3Objects:
        if self._s3 is None:
            # boto3 and obstore take 0.3 s to import; local runs need not pay.
            from plmsae_cli.store.s3 import S3Objects

            self._s3 = S3Objects(self._storage)
        return self._s3

    def exists(self, path: str) -> bool:
        """Whether there is a file at `path` (a folder is none: S3 has no folders)."""
        return self._at(path).exists(path)

    def size(self, path: str) -> int:
        """Bytes in the file."""
        return self._at(path).size(path)

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Exactly `length` bytes from byte `start`; to the end without `length`."""
        return self._at(path).read(path, start, length)

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from byte `start`.

        Locally the bytes go straight into the buffer; from S3 large ranges come as parallel pieces.
        A file that ends too early is a DamagedError naming the file and the range.
        """
        if buffer.nbytes:
            self._at(path).read_into(path, start, buffer.cast("B"))

    def prefetch(self, path: str, start: int, length: int) -> None:
        """Have the disk read this range into the page cache, if it likes; of S3 nothing is asked. May take as long as reading."""
        if not is_remote(path):
            self._local.prefetch(path, start, length)

    def hash(self, path: str) -> FileRecord:
        """Read the whole file again, in pieces, and say what it is now."""
        return self._at(path).hash(path)

    def write(self, path: str, buffers: Iterable[Buffer], *, size: int | None = None) -> FileRecord:
        """Write the concatenated `buffers` as the new content of `path`, making its folder.

        The buffers may be a generator (memory stays bounded) that reuses one buffer: each is done with when
        the next is asked for.
        `size`, the sum of their lengths where the caller knows it, lets the message of a full disk be exact.
        """
        return self._at(path).write(path, buffers, size)

    def write_once(self, path: str, data: bytes) -> bool:
        """Create `path` with `data` if nothing is there; False, and nothing changed, if something is.

        Of any number of simultaneous callers at most one gets True. On S3 a lost answer can make the one
        whose data are there get False: decide by what `read` returns, not by who got True.
        """
        return self._at(path).write_once(path, data)

    def list(self, folder: str) -> dict[str, int]:
        """Every file below `folder`, at any depth: name relative to it -> bytes. Absent folder: {}.

        Files that are still being written, or were when a process died, are left out.
        """
        return self._at(folder).list(folder)

    def entries(self, folder: str) -> dict[str, tuple[int, float]]:
        """Of a folder in S3 every object, temporaries too: name -> bytes, and when it was written in s since 1970."""
        assert is_remote(folder)
        return self._bucket().entries(folder)

    def open_uploads(self, folder: str) -> Iterator[Upload]:
        """Uploads below a folder in S3 that were begun and not completed. Raises StoreError where they cannot be listed."""
        from plmsae_cli.store.s3_uploads import open_uploads

        return open_uploads(self._storage, folder)

    def abort_upload(self, path: str, upload_id: str) -> None:
        """Give up one of them."""
        from plmsae_cli.store.s3_uploads import abort_upload

        abort_upload(self._storage, path, upload_id)

    def delete(self, path: str) -> None:
        """Remove the file; fine if it is absent."""
        self._at(path).delete(path)

    def local(self, path: str) -> Path:
        """A local file with the content of `path`: itself, or a download kept in the cache.

        The cache is `$PLMSAE_CACHE`, by default `~/.cache/plmsae`; a changed object is downloaded anew.
        """
        return self._at(path).local(path)

    def probe(self, folder: str, write: bool = False) -> None:
        """Find out in seconds whether `folder` can be used, before work is spent on it.

        Raises StoreError with a hint: no permission, expired or absent credentials, no such bucket, an
        endpoint that does not answer, plain http without leave. With `write`, writing is tried as well.
        """
        self._at(folder).probe(folder, write)
