"""`plmsae fetch`: published inputs, with their size first."""

from __future__ import annotations

import difflib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plmsae_cli.cli.exits import DONE, checked
from plmsae_cli.cli.show import print_json, size, table


def fetch_names(
    names: Sequence[str], folder: Path | None, chunks: int, mirror: str | None, dry: bool, as_json: bool, plain: bool
) -> int:
    """Show what would be fetched, then fetch it."""

    def work() -> int:
        from plmsae_cli.config.errors import UserError
        from plmsae_cli.store.download import download
        from plmsae_cli.store.sources import place_of, sources
        from plmsae_cli.store.weights import cache_folder

        known = sources()
        if not names:
            if as_json:
                print_json(sources=[{"name": each.name, "help": each.help} for each in known.values()])
            else:
                print(table([[each.name, each.help] for each in known.values()], ["name", "what it is"]))
            return DONE
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1, 0.5)
                hint = f"did you mean {near[0]}?" if near else f"one of: {', '.join(known)}"
                raise UserError(f"nothing to fetch is called {name}", hint)
        files = []
        for name in dict.fromkeys(names):
            place = place_of(known[name], folder, cache_folder())
            files += [(place / remote.name, remote) for remote in known[name].find(chunks, mirror)]
        left = [(path, remote) for path, remote in files if not path.exists()]
        wanted = sum((remote.size or 0) - _there(path) for path, remote in left)
        if not as_json:
            rows = [
                [
                    str(path),
                    "?" if remote.size is None else size(remote.size),
                    "there" if path.exists() else f"{size(_there(path))} there" if _there(path) else "",
                    remote.checksum.kind if remote.checksum is not None else "-",
                ]
                for path, remote in files
            ]
            print(table(rows, ["file", "size", "", "checksum"]))
            print(f"{size(wanted)} to fetch")
        if left:
            _room(left[0][0].parent, wanted)
        if not dry:
            for path, remote in left:
                shown = _Shown(path.name, plain or as_json)
                download(remote.url, path, shown, remote.size, remote.checksum)
                shown.end()
        if as_json:
            body: list[dict[str, Any]] = [
                {"file": str(path), "url": remote.url, "bytes": remote.size, "there": path.exists()}
                for path, remote in files
            ]
            print_json(files=body)
        return DONE

    return checked(work)


def _there(path: Path) -> int:
    part = path.with_name(f".{path.name}.part")
    return part.stat().st_size if part.is_file() else 0


def _room(folder: Path, wanted: int) -> None:
    """Raises UserError where the disk has too little room."""
    from plmsae_cli.config.errors import UserError
    from plmsae_cli.runtime.checks import nearest

    free = shutil.disk_usage(nearest(folder)).free
    if wanted > free:
        raise UserError(
            f"{size(wanted)} are to be fetched, {folder} has {size(free)} free", "name another disk with --to"
        )


class _Shown:
    """Bytes so far, on a reporter's line."""

    def __init__(self, name: str, plain: bool) -> None:
        from plmsae_cli.runtime.progress import reporter

        self._line = reporter(live=not plain)
        self._line.begin(name)
        self._name, self._done = name, 0

    def __call__(self, done: int, total: int | None) -> None:
        self._done = done
        if total:
            self._line.update(done, total)

    def end(self) -> None:
        self._line.end(size(self._done))
        sys.stderr.flush()
