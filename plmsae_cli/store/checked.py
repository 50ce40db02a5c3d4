"""Files hashed when they are first read: a damaged chunk is named before long, and not trained on for epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from plmsae_cli.store.fs import DamagedError, Store, StoreError, is_remote, join

_MEND = "delete the file and the MANIFEST.json of its folder, then run the stage that makes it: it alone is made anew"


class CheckedReads(Store):
    """A Store that hashes each local file of an artifact, once, beside the first read of it.

    One thread reads the whole file, which brings it into the page cache ahead of its readers. What differs from the
    manifest is the error of the next `read_into`, whatever file that asks for, or of `finish`. Objects in S3 are left
    to their transport's own checks: they would have to be fetched twice.

    Args:
        inner: where reads go.
        folder: the artifact.
        files: its manifest's records.
        rank, world: of those that share the reading; each checks its share of the files.
    """

    def __init__(
        self, inner: Store, folder: str, files: Sequence[Mapping[str, object]], rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(inner._storage)
        self._inner = inner
        names = sorted(str(file["name"]) for file in files) if not is_remote(folder) else []
        own = set(names[rank::world])
        self._expected = {
            join(folder, str(file["name"])): (file["size"], file["xxh3"]) for file in files if file["name"] in own
        }
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._begun: list[Future[None]] = []
        self._found: StoreError | None = None

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        return self._inner.read(path, start, length)

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        expected = self._expected.pop(path, None)  # atomic: of several threads one starts the check
        if expected is not None:
            self._begun.append(self._thread.submit(self._check, path, *expected))
        if self._found is not None:
            raise self._found
        self._inner.read_into(path, start, buffer)

    def finish(self) -> None:
        """Wait for the checks that reads have begun so far. Raises DamagedError for what they found."""
        wait(self._begun)
        if self._found is not None:
            raise self._found

    def close(self) -> None:
        """Begin no further check."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _check(self, path: str, size: object, xxh3: object) -> None:
        try:
            found = self._inner.hash(path)
            if found.size != size:
                raise DamagedError(f"{path} has {found.size} bytes, its manifest says {size}", _MEND)
            if found.xxh3 != xxh3:
                raise DamagedError(f"{path} is damaged: its xxh3 is {found.xxh3}, its manifest says {xxh3}", _MEND)
        except StoreError as error:
            self._found = error
