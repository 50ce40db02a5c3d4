"""One process at a time: on a run, on a folder's queue, on a smoke run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from plmsae_cli.config.errors import UserError
from plmsae_cli.runtime.run_folder import RunFolder


class Locked(UserError):
    """Another process works on it."""


@contextmanager
def held(path: Path, refusal: Callable[[], Locked]) -> Iterator[None]:
    """Hold the lock file `path`, which dies with its process. Raises what `refusal` makes where another process does."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise refusal() from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """One process at a time on a run.

    Raises:
        Locked: another one works on it.
    """
    run.path.parent.mkdir(parents=True, exist_ok=True)
    refusal = Locked(f"another plmsae process is working on {run.path}", "wait for it, or stop it")
    with held(run.path.parent / f".{run.path.name}.lock", lambda: refusal):
        yield
