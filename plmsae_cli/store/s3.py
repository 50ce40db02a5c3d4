"""Objects in S3, through obstore.

Everything is bounded: a request by its time-outs, its retries by their number and by a minute, memory by the
pieces in flight. A write is one PUT, or a multipart upload that appears only when complete, and its size is
read back. An upload that dies leaves invisible parts behind: `clean` finds them (s3_uploads.py), and a bucket wants
a rule that expires incomplete multipart uploads.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import obstore
import xxhash
from obstore.exceptions import AlreadyExistsError

from plmsae_cli.config.faults import fault
from plmsae_cli.store.local import LocalFiles
from plmsae_cli.store.records import (
    Buffer,
    FileRecord,
    MissingError,
    StoreError,
    flat,
    is_temporary,
)
from plmsae_cli.store.s3_client import claim_process, connect, endpoint_of, probe, split_url
from plmsae_cli.store.s3_errors import again, check_length, checked, explained

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult
    from obstore.store import S3Store

    from plmsae_cli.config.experiment import Storage

_RANGE = 5 << 20
"""Bytes a request when a large range is read in parallel."""
_IN_FLIGHT = 32
"""Such requests at a time, over all readers: with 50 ms to the first byte each GB/s needs about 16."""
_CHUNK = 1 << 20
"""Bytes of a request that are copied to their place at a time."""
_PIECES_AHEAD = 16
"""Pieces of one file that are read before they are wanted."""
_PART = 16 << 20
"""Bytes of one part of an upload; anything up to this size is a single PUT."""
_PARTS_IN_FLIGHT = 8


def _same_content(one: str | None, other: str | None) -> bool:
    """Whether two etags are one, as far as the server says; some answers quote them and others do not."""
    return one is None or other is None or one.strip('"') == other.strip('"')


class S3Objects:
    """The methods of `Store` for `s3://` URLs."""

    def __init__(self, storage: Storage | None) -> None:
        self._storage = storage
        self._endpoint = endpoint_of(storage)
        self._clients: dict[str, S3Store] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._making = Lock()

    def exists(self, path: str) -> bool:
        try:
            self._head(path)
        except MissingError:
            return False
        return True

    def size(self, path: str) -> int:
        return int(self._head(path)["size"])

    def read(self, path: str, start: int, length: int | None) -> bytes:
        if length is None and start == 0:  # one request for the many small files
            client, key = self._client(path)
            with explained("read", path, self._endpoint):
                answer = again(lambda: obstore.get(client, key))
                size = answer.meta["size"]
                if size <= _RANGE:
                    return bytes(checked(answer.bytes(), path, 0, size))
        if length is not None:
            return b"".join(self._pieces(path, start, start + length))
        head = self._head(path)
        return b"".join(self._pieces(path, start, max(head["size"], start), head["e_tag"]))

    def etag(self, path: str) -> str:
        """What the server calls this content of the object."""
        return str(self._head(path)["e_tag"])

    def read_into(self, path: str, start: int, buffer: memoryview, etag: str | None = None) -> None:
        """Large ranges come as pieces, all requested at once, each copied to its place as it arrives.

        With `etag`, an object replaced meanwhile is an error rather than a mixture of two.
        """
        stop = start + buffer.nbytes
        target = np.frombuffer(buffer, np.uint8)

        def fetch(first: int) -> None:
            last = min(first + _RANGE, stop)
            place, done = target[first - start : last - start], 0
            with explained("read", path, self._endpoint):
                # As it arrives: the whole range at once would have been put together in memory before.
                for chunk in self._get(path, first, last, etag).stream(min_chunk_size=_CHUNK):
                    piece = np.frombuffer(
                        chunk, np.uint8
                    )  # numpy's copy lets other threads run, a memoryview's does not
                    place[done : done + piece.size] = piece
                    done += piece.size
            check_length(done, path, first, last)

        firsts = range(start, stop, _RANGE)
        if len(firsts) == 1:
            fetch(start)
            return
        pieces = [self._requests().submit(fetch, first) for first in firsts]
        try:
            for piece in pieces:
                piece.result()
        except BaseException:
            for piece in pieces:
                piece.cancel()
            wait(pieces)  # none may write into the buffer any more
            raise

    def hash(self, path: str) -> FileRecord:
        head = self._head(path)
        hasher = xxhash.xxh3_128()
        for piece in self._pieces(path, 0, head["size"], head["e_tag"]):
            hasher.update(piece)
        return FileRecord(path, head["size"], hasher.hexdigest())

    def write(self, path: str, buffers: Iterable[Buffer], size: int | None) -> FileRecord:
        client, key = self._client(path)
        hasher = xxhash.xxh3_128()
        written = 0

        def parts() -> Iterator[bytearray]:
            # Copies: the upload still holds a part when the caller fills its next buffer.
            nonlocal written
            part = bytearray()
            for view in flat(buffers):
                hasher.update(view)
                written += view.nbytes
                while view.nbytes:
                    room = _PART - len(part)
                    part += view[:room]
                    view = view[room:]
                    if len(part) == _PART:
                        yield part
                        part = bytearray()
            if part:
                yield part

        fault("store.write.before-rename", path=path)
        source = parts()
        first = next(source, bytearray())
        second = next(source, None)
        with explained("write", path, self._endpoint):
            if second is None:
                put = again(lambda: obstore.put(client, key, first, use_multipart=False))
            else:
                whole = chain((first, second), source)
                put = obstore.put(client, key, whole, chunk_size=_PART, max_concurrency=_PARTS_IN_FLIGHT)
        assert size is None or size == written, f"{path}: {size} bytes announced, {written} came"
        stored = self._head(path)
        # With another etag it is what somebody else has written there since, and theirs to judge.
        if stored["size"] != written and _same_content(stored["e_tag"], put["e_tag"]):
            self.delete(path)
            raise StoreError(
                f"{path} was stored short and removed: {written} bytes were sent, {stored['size']} kept",
                hint="start again; if it happens again, the server or a proxy in front of it is faulty",
            )
        fault("store.write.after-rename", path=path)
        return FileRecord(path, written, hasher.hexdigest())

    def write_once(self, path: str, data: bytes) -> bool:
        client, key = self._client(path)
        with explained("write", path, self._endpoint):
            try:
                again(lambda: obstore.put(client, key, data, mode="create", use_multipart=False))
            except AlreadyExistsError:
                return False
        return True

    def list(self, folder: str) -> dict[str, int]:
        return {n: size for n, (size, _) in self.entries(folder).items() if not is_temporary(n.rpartition("/")[2])}

    def entries(self, folder: str) -> dict[str, tuple[int, float]]:
        """Every object below `folder`, temporaries too: name -> bytes, and when it was written in s since 1970."""
        client, prefix = self._client(folder, whole_bucket=True)
        start = len(prefix) + 1 if prefix else 0
        with explained("list", folder, self._endpoint):
            found = again(
                lambda: {
                    meta["path"][start:]: (int(meta["size"]), meta["last_modified"].timestamp())
                    for page in obstore.list(client, prefix or None, chunk_size=1000)
                    for meta in page
                }
            )
        return {n: entry for n, entry in found.items() if n}

    def delete(self, path: str) -> None:
        client, key = self._client(path)
        with explained("delete", path, self._endpoint):
            try:
                again(lambda: obstore.delete(client, key))
            except FileNotFoundError:  # some servers say so, AWS does not
                return

    def local(self, path: str) -> Path:
        head = self._head(path)
        identity = f"{self._endpoint} {path} {head['e_tag']} {head['size']}"
        cache = Path(os.environ.get("PLMSAE_CACHE", "~/.cache/plmsae")).expanduser()
        folder = cache / "s3" / hashlib.sha256(identity.encode()).hexdigest()[:32]
        target = folder / path.rpartition("/")[2]
        if not target.exists():  # the rename in `write` lets simultaneous downloads end well
            pieces = self._pieces(path, 0, head["size"], head["e_tag"])
            LocalFiles().write(str(target), pieces, head["size"])
        return target

    def probe(self, folder: str, write: bool) -> None:
        probe(folder, self._storage, self._endpoint, write)

    def _head(self, path: str) -> Any:
        client, key = self._client(path)
        with explained("read", path, self._endpoint):
            return again(lambda: obstore.head(client, key))

    def _pieces(self, path: str, start: int, stop: int, etag: str | None = None) -> Iterator[memoryview]:
        """Bytes [start, stop) in order, as pieces; several are fetched at a time.

        With `etag`, an object replaced meanwhile is an error rather than a mixture of two.
        """
        firsts = range(start, stop, _RANGE)
        if len(firsts) <= 1:
            yield from (self._fetch(path, first, min(first + _RANGE, stop), etag) for first in firsts)
            return
        pending: deque[Future[memoryview]] = deque()
        try:
            for first in firsts:
                last = min(first + _RANGE, stop)
                pending.append(self._requests().submit(self._fetch, path, first, last, etag))
                if len(pending) == _PIECES_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for piece in pending:
                piece.cancel()

    def _fetch(self, path: str, start: int, stop: int, etag: str | None) -> memoryview:
        """Bytes [start, stop) in one request."""
        with explained("read", path, self._endpoint):
            return checked(self._get(path, start, stop, etag).bytes(), path, start, stop)

    def _get(self, path: str, start: int, stop: int, etag: str | None) -> GetResult:
        client, key = self._client(path)
        options: GetOptions = {"range": (start, stop)}
        if etag is not None:
            options["if_match"] = etag
        return again(lambda: obstore.get(client, key, options=options))

    def _requests(self) -> ThreadPoolExecutor:
        """Threads for all pieces of all reads, so that what is in flight is bounded whoever reads."""
        with self._making:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="s3")
            return self._pool

    def _client(self, url: str, whole_bucket: bool = False) -> tuple[S3Store, str]:
        """The bucket's client, made on first use, and the key."""
        bucket, key = split_url(url)
        if not key and not whole_bucket:
            raise StoreError(f"{url} names a bucket, not an object in it", hint="write s3://bucket/folder/file")
        claim_process()
        if bucket not in self._clients:
            self._clients[bucket] = connect(bucket, self._storage, self._endpoint)
        return self._clients[bucket], key
