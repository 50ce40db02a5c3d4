"""Files on a mounted file system."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from plmsae_cli.config.faults import fault
from plmsae_cli.store.records import (
    Buffer,
    DamagedError,
    FileRecord,
    MissingError,
    StoreError,
    flat,
    is_temporary,
)

_PIECE = 4 << 20
"""Bytes hashed, copied and given to the disk at a time: small enough that the second use finds them in cache."""
_SMALL = 64 << 10
"""Buffers below this are gathered by copying: a system call each would cost more."""
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file is larger than this user may write",
}

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_ROOM = "free some space or name another folder, then start again: nothing that was complete is lost"


@contextmanager
def _explained(action: str, path: str) -> Iterator[None]:
    """Turn the system's errors into ours, which name the file and say what to do."""
    try:
        yield
    except StoreError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingError(f"cannot {action} {path}: {error.strerror or error}") from error
    except OSError as error:
        hint = "check who owns the folder" if isinstance(error, PermissionError) else None
        if error.errno in _FULL:  # of files too: `df -i`
            hint = _ROOM
        raise StoreError(f"cannot {action} {path}: {error.strerror or error}", hint) from error


@contextmanager
def _opened(path: str) -> Iterator[int]:
    """The file's descriptor, for reading."""
    with _explained("read", path):
        descriptor = os.open(os.path.expanduser(path), os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _fill(descriptor: int, path: str, start: int, buffer: memoryview) -> None:
    """The file's bytes from byte `start` on. Raises DamagedError where it ends too early."""
    done = 0
    while done < buffer.nbytes:  # one call suffices below 2 GiB
        got = os.preadv(descriptor, [buffer[done:]], start + done)
        if got == 0:
            raise DamagedError(
                f"{path} is cut short: bytes {start} to {start + buffer.nbytes} were asked for,"
                f" it has {os.fstat(descriptor).st_size}"
            )
        done += got


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _begin_writing(descriptor: int, start: int, size: int) -> None:
    """Have the disk at work while the next bytes are hashed and copied, instead of from `fsync` on: Linux begins to write what
    it is told nobody needs, and keeps pages that it has not written yet."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # it is advice
            os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


def _make_folder(folder: Path) -> None:
    """mkdir -p that survives a power cut: a new folder's name is synced in its parent."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir()
            _sync_folder(folder.parent)


def _pieces(buffers: Iterable[Buffer]) -> Iterator[memoryview]:
    """The same bytes in pieces fit for writing; a buffer is done with when the next one is asked for."""
    small = bytearray()
    for view in flat(buffers):
        if view.nbytes < _SMALL:
            small += view
            if len(small) < _PIECE:
                continue
        if small:
            yield memoryview(small)
            small = bytearray()
        if view.nbytes >= _SMALL:
            yield from (view[start : start + _PIECE] for start in range(0, view.nbytes, _PIECE))
    if small:
        yield memoryview(small)


class LocalFiles:
    """The methods of `Store` for local paths."""

    def exists(self, path: str) -> bool:
        return os.path.isfile(os.path.expanduser(path))

    def size(self, path: str) -> int:
        with _explained("read", path):
            return os.stat(os.path.expanduser(path)).st_size

    def read(self, path: str, start: int, length: int | None) -> bytes:
        with _opened(path) as descriptor:
            # Of the open file: under its name another one, of another size, may lie a moment later.
            if length is None:
                length = max(os.fstat(descriptor).st_size - start, 0)
            data = bytearray(length)
            _fill(descriptor, path, start, memoryview(data))
        return bytes(data)

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        with _opened(path) as descriptor:
            _fill(descriptor, path, start, buffer)

    def prefetch(self, path: str, start: int, length: int) -> None:
        with suppress(OSError):  # whoever reads it in earnest will tell
            descriptor = os.open(os.path.expanduser(path), os.O_RDONLY)
            try:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def hash(self, path: str) -> FileRecord:
        hasher = xxhash.xxh3_128()
        size = 0
        piece = memoryview(bytearray(_PIECE))
        with _explained("read", path), open(os.path.expanduser(path), "rb", buffering=0) as file:
            while got := file.readinto(piece):
                hasher.update(piece[:got])
                size += got
        return FileRecord(path, size, hasher.hexdigest())

    def write(self, path: str, buffers: Iterable[Buffer], size: int | None) -> FileRecord:
        target = Path(path).expanduser()
        with _explained("write", path):
            temporary, record = self._write_temporary(path, target, buffers, size)
            try:
                fault("store.write.before-rename", path=path)
                os.replace(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            fault("store.write.after-rename", path=path)
            _sync_folder(target.parent)
        return record

    def write_once(self, path: str, data: bytes) -> bool:
        target = Path(path).expanduser()
        with _explained("write", path):
            if os.path.lexists(target):
                return False
            temporary, _ = self._write_temporary(path, target, [data], len(data))
            try:
                # A hard link, unlike a rename, fails if the name is taken.
                os.link(temporary, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                raise StoreError(
                    f"cannot write {path}: its file system has no hard links",
                    hint="name a data_root (for a run: a root) on another disk: of several writers a link lets one be first",
                ) from error
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(target.parent)
        return True

    def _write_temporary(
        self, path: str, target: Path, buffers: Iterable[Buffer], size: int | None
    ) -> tuple[Path, FileRecord]:
        """Write and sync the bytes beside `target`; nothing is left behind on an error."""
        _make_folder(target.parent)
        temporary = target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        hasher = xxhash.xxh3_128()
        written = reached = begun = 0
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                for piece in _pieces(buffers):
                    reached = written + piece.nbytes
                    hasher.update(piece)
                    while written < reached:
                        written += os.write(descriptor, piece[written - reached :])
                    if written - begun >= _PIECE:
                        _begin_writing(descriptor, begun, written - begun)
                        begun = written
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in _FULL:
                raise _full(path, target.parent, error, reached, size) from error
            raise
        assert size is None or size == written, f"{path}: {size} bytes announced, {written} came"
        return temporary, FileRecord(path, written, hasher.hexdigest())

    def list(self, folder: str) -> dict[str, int]:
        root = os.path.expanduser(folder)
        sizes: dict[str, int] = {}

        def on_error(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise error

        with _explained("list", folder):
            for parent, _, names in os.walk(root, onerror=on_error):
                for name in names:
                    full = os.path.join(parent, name)
                    if not is_temporary(name):
                        with suppress(FileNotFoundError):  # deleted since the folder was read
                            sizes[os.path.relpath(full, root)] = os.stat(full).st_size
        return sizes

    def delete(self, path: str) -> None:
        with _explained("delete", path):
            Path(path).expanduser().unlink(missing_ok=True)

    def local(self, path: str) -> Path:
        self.size(path)
        return Path(path).expanduser()

    def probe(self, folder: str, write: bool) -> None:
        place = Path(folder).expanduser().absolute()
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise StoreError(f"{folder} cannot be a folder: {place} is a file", hint="choose another folder")
        if not os.access(place, os.R_OK | os.X_OK | (os.W_OK if write else 0)):
            verb = "written" if write else "read"
            raise StoreError(f"{place} cannot be {verb} by this user", hint="check its permissions")


def _full(path: str, folder: Path, error: OSError, reached: int, size: int | None) -> StoreError:
    system = os.statvfs(folder)
    needed = f"{size}" if size is not None else f"at least {reached}"
    return StoreError(
        f"cannot write {path}: {_FULL[error.errno or 0]}; {needed} bytes needed,"
        f" {system.f_bavail * system.f_frsize} free on its file system",
        hint=_ROOM,
    )
