"""The queue: experiment files in name order, one after the other; files dropped in while it runs are picked up."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.files import is_experiment
from plmsae_cli.executors.locks import Locked, held
from plmsae_cli.runtime.run_folder import read_json, write_json
from plmsae_cli.runtime.stop import STOP


@dataclass
class Entry:
    """One experiment of the queue and what became of it."""

    path: Path
    state: str = "pending"
    """pending, running, done, skipped (nothing was left to do), failed, interrupted"""
    seconds: float = 0.0
    note: str = ""
    error: Exception | None = None
    """What it failed with."""
    changed: int = 0
    """When its file was last written before its turn, in ns since 1970; 0 if it is gone."""
    begun: bool = False
    """Whether a run was started; a further attempt continues it."""

    @classmethod
    def of(cls, path: Path) -> Entry:
        return cls(path, changed=_changed(path))


def find(targets: Sequence[Path], watch: bool = False) -> list[Path]:
    """Files as given; of a folder, the YAMLs at its top, in name order.

    Raises:
        UserError: a target does not exist, or there is nothing to run. With `watch`, none of the targets is a folder.
    """
    if watch and not any(target.is_dir() for target in targets):
        raise UserError("--watch waits for YAMLs in a folder, and none was named", "plmsae run experiments/ --watch")
    found: list[Path] = []
    for target in targets:
        if target.is_dir():
            found += _in_folder(target)
        elif target.exists():
            found.append(target)
        else:
            raise UserError(f"{target} does not exist", "name YAML files, or folders of them")
    if not found and not watch:
        raise UserError(
            f"no experiments in {', '.join(map(str, targets))}",
            "drop YAML files there; `plmsae init my.yaml` writes one to begin with",
        )
    return list(dict.fromkeys(found))


def _in_folder(folder: Path) -> list[Path]:
    """Its experiment files in name order; none if it is no folder, or was removed meanwhile."""
    try:
        return sorted(p for p in folder.iterdir() if is_experiment(p) and not p.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One queue at a time on a folder. The lock dies with its process; the file says who holds it.

    Raises:
        Locked: names the holder.
        UserError: there is no writing to the folder.
    """
    card = folder / ".queue.json"

    def refusal() -> Locked:
        holder = read_json(card) or {}
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.get("started", time.time())))
        who = f"pid {holder.get('pid', '?')} on {holder.get('host', '?')} since {since}"
        return Locked(
            f"a queue runs on {folder} already: {who}",
            "YAMLs dropped into the folder now are picked up by it",
        )

    if not os.access(folder, os.W_OK):
        raise UserError(
            f"{folder} cannot be written to, and a queue keeps its lock in its folder",
            f"copy its YAMLs elsewhere, or name them one by one: `plmsae run {folder}/*.yaml`",
        )
    with held(folder / ".queue.lock", refusal):
        try:
            write_json(card, {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()})
            yield
        finally:
            card.unlink(missing_ok=True)


@contextmanager
def smoke_folder(root: Path) -> Iterator[None]:
    """An empty folder for a smoke run, which proves something only if it runs; one smoke run at a time.

    Raises:
        Locked: another one runs in this folder.
    """
    assert "bugfix" in root.name
    root.parent.mkdir(parents=True, exist_ok=True)
    refusal = Locked(f"another --bugfix runs in {root}", "wait for it, or start in another folder")
    with held(root.with_name(f".{root.name}.lock"), lambda: refusal):
        shutil.rmtree(root, ignore_errors=True)
        yield


WATCH_EVERY_S = 1.0


def run_queue(
    targets: Sequence[Path],
    run_one: Callable[[Entry], None],
    again: Callable[[Entry], bool] = lambda entry: False,
    watch: Callable[[], None] | None = None,
    entries: list[Entry] | None = None,
) -> list[Entry]:
    """Run every experiment. After a wish to stop, the rest stay pending.

    Args:
        run_one: runs one, and sets its entry's state.
        again: after a failure: waits as long as it takes, and says whether to try the same one again.
        watch: told once before the queue waits for further files; without it the queue ends where there are none.
        entries: the list to fill, for whoever looks on.
    """
    entries = [] if entries is None else entries
    entries += [Entry.of(path) for path in find(targets, watch is not None)]
    begun = 0
    while not STOP.requested():
        if begun == len(entries):
            entries += _dropped(targets, entries)
        if begun == len(entries):
            if watch is None or not _more_to_come(targets, entries, watch):
                break
            continue
        entry = entries[begun]
        begun += 1
        entry.changed = _changed(entry.path)
        started = time.monotonic()
        while True:
            entry.state, entry.error = "running", None
            run_one(entry)
            if entry.state != "failed" or not again(entry):
                break
        entry.seconds = time.monotonic() - started
        if entry.state == "interrupted":
            break
        entries += _dropped(targets, entries)
    return entries


def _more_to_come(targets: Sequence[Path], entries: Sequence[Entry], tell: Callable[[], None]) -> bool:
    """Wait for another file; false after a wish to stop."""
    tell()
    while not STOP.requested():
        if _dropped(targets, entries):
            return True
        time.sleep(WATCH_EVERY_S)
    return False


def _dropped(targets: Sequence[Path], entries: Sequence[Entry]) -> list[Entry]:
    """Files of the folders that are new, are back, or were written to since their turn began."""
    latest = {entry.path: entry for entry in entries}
    found = []
    for path in [path for folder in targets for path in _in_folder(folder)]:
        known = latest.get(path)
        again = known is not None and known.state != "pending"
        if known is None or (again and _changed(path) not in (0, known.changed)):
            found.append(Entry.of(path))
            latest[path] = found[-1]
    return found


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
