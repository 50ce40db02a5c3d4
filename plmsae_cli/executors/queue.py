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
from plmsae_cli.executors.locks import Locked, held
from plmsae_cli.runtime.run_folder import read_json, write_json
from plmsae_cli.runtime.stop import STOP


@dataclass
class Entry:
    """One experiment of the queue and what became of it."""

    path: Path
    state: str = "pending"
    """pending, done, skipped (nothing was left to do), failed, interrupted"""
    seconds: float = 0.0
    note: str = ""


def find(targets: Sequence[Path]) -> list[Path]:
    """Files as given; of a folder, the YAMLs at its top, in name order.

    Raises:
        UserError: a target does not exist, or there is nothing to run.
    """
    found: list[Path] = []
    for target in targets:
        if target.is_dir():
            found += _in_folder(target)
        elif target.exists():
            found.append(target)
        else:
            raise UserError(f"{target} does not exist", "name YAML files, or folders of them")
    if not found:
        raise UserError(
            f"no experiments in {', '.join(map(str, targets))}",
            "drop YAML files there; `plmsae init my.yaml` writes one to begin with",
        )
    return list(dict.fromkeys(found))


def _in_folder(folder: Path) -> list[Path]:
    """Its experiment files in name order; none if it was removed meanwhile."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix in (".yaml", ".yml") and not p.name.startswith("."))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One queue at a time on a folder. The lock dies with its process; the file says who holds it.

    Raises:
        Locked: names the holder.
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


def run_queue(targets: Sequence[Path], run_one: Callable[[Entry], None]) -> list[Entry]:
    """Run every experiment; `run_one` sets its entry's state. After a wish to stop, the rest stay pending."""
    entries = [Entry(path) for path in find(targets)]
    for entry in entries:  # which grows: files dropped into a folder meanwhile are appended
        if STOP.requested():
            break
        begun = time.monotonic()
        run_one(entry)
        entry.seconds = time.monotonic() - begun
        if entry.state == "interrupted":
            break
        known = {e.path for e in entries}
        entries += [Entry(path) for folder in targets for path in _in_folder(folder) if path not in known]
    return entries
