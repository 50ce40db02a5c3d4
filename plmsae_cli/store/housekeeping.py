"""What is damaged, what is left over, and how artifacts are freed: the bytes' side of `verify`, `clean` and `keep`."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from plmsae_cli.store.fs import DamagedError, FileRecord, MissingError, Store, StoreError, join
from plmsae_cli.store.manifest import MANIFEST, canonical_json, differs, file_records, read_manifest, read_parts
from plmsae_cli.store.records import is_temporary

FREED = "FREED.json"
"""The record of an artifact whose data were given up: its manifest without the files."""
DATA_FOLDER = re.compile(r"(embed|shuffle|optimize|tokens)-[0-9a-f]{16}")
CHECKPOINTS = "checkpoints"
_OWN = (MANIFEST, FREED, "plan.json")


@dataclass(frozen=True)
class Damage:
    """A file that is not what was recorded."""

    path: str
    problem: str
    """`missing`, or what differs."""
    task: str | None
    """The task that made it, where a record says so."""
    folder: str

    @property
    def remedy(self) -> str:
        """What to do about it."""
        if CHECKPOINTS in self.path.removeprefix(self.folder).split("/"):
            return "training goes on from the checkpoint before it: nothing is to be done, or delete the folder of this one"
        if self.path in (join(self.folder, MANIFEST), join(self.folder, "parts", Path(self.path).name)):
            return "delete it, then start its experiment again: the record is made anew"
        made = f"task {self.task} made it" if self.task else "it is no task's alone"
        if self.problem == "missing":
            return f"{made}: delete {join(self.folder, MANIFEST)}, then start its experiment again: that task alone is redone"
        return (
            f"{made}: delete it and {join(self.folder, MANIFEST)}, then start its experiment again:"
            " what is absent is made anew, the rest stays"
        )


def damages(store: Store, folder: str) -> list[Damage]:
    """Every damaged file of an artifact, finished or not, or of a run: all that a manifest or a task's record lists."""
    try:
        parts = read_parts(store, folder)
        manifest = read_manifest(store, folder)
    except DamagedError as error:
        path, _, reason = error.message.partition(" is damaged: ")
        return [Damage(path, f"not the record it was ({reason})", None, folder)]
    maker = {file.name: part.task for part in parts.values() for file in part.files}
    if manifest is not None:
        files = file_records(join(folder, MANIFEST), manifest)
    else:
        files = [file for part in parts.values() for file in part.files]
    problems = [(file.name, problem) for file in files if (problem := differs(store, folder, file)) is not None]
    problems += _checkpoints(store, folder)
    return [Damage(join(folder, name), problem, maker.get(name), folder) for name, problem in problems]


def _checkpoints(store: Store, folder: str) -> list[tuple[str, str]]:
    """Name and problem of each damaged file of a run's checkpoints, of those that were committed."""
    found: list[tuple[str, str]] = []
    for listed in sorted(store.list(join(folder, CHECKPOINTS))):
        name = f"{CHECKPOINTS}/{listed}"
        step, _, file = listed.partition("/")
        if file != "CHECKPOINT.json":
            continue
        try:
            ranks = json.loads(store.read(join(folder, name)))["commit"]["ranks"]
            stem = f"{CHECKPOINTS}/{step}/rank"
            records = [FileRecord(f"{stem}-{i}.safetensors", r["size"], r["xxh3"]) for i, r in enumerate(ranks)]
        except MissingError:
            continue
        except (KeyError, TypeError, ValueError) as error:
            found.append((name, f"not a checkpoint's record ({error})"))
            continue
        problems = [(r.name, problem) for r in records if (problem := differs(store, folder, r)) is not None]
        if store.exists(join(folder, name)):  # else training has dropped it for newer ones meanwhile
            found += problems
    return found


def free(store: Store, folder: str) -> int | None:
    """Give up an artifact's data, its manifest first; a record of what it was stays.

    Returns:
        The bytes freed; None where another process was first.
    """
    manifest = read_manifest(store, folder)
    if manifest is None:
        return None
    freed = sum(int(file["size"]) for file in manifest["files"])
    kept = {k: v for k, v in manifest.items() if k not in ("files", "parts")}
    # Record, then manifest, then data: wherever this is cut short, the next `clean` finds a record and what to delete.
    store.write(join(folder, FREED), [canonical_json({**kept, "bytes": freed, "freed": time.time()})])
    store.delete(join(folder, MANIFEST))
    for name in store.list(folder):
        if name not in _OWN:
            store.delete(join(folder, name))
    store.delete(join(folder, "plan.json"))
    _prune(folder)
    return freed


@dataclass(frozen=True)
class Leaving:
    """Something that no longer serves."""

    path: str
    bytes: int
    why: str
    whole: bool = False
    """A folder with all it holds, rather than one file."""
    upload: str | None = None
    """The open upload that it is, rather than a file."""


def leavings(root: Path, used: Collection[str], older: float, unused: bool) -> Iterator[Leaving]:
    """What may go under a local root.

    Args:
        used: names of the data folders that runs point to; a name holds the key, so it tells an artifact wherever it lies.
        older: seconds since something was last written; what is younger may still be at work, or about to be used.
        unused: finished artifacts that no run points to as well.
    """
    now = time.time()
    for parent, folders, names in os.walk(root):
        folder = Path(parent)
        yield from _temporaries(folder, names, now - older)
        if not DATA_FOLDER.fullmatch(folder.name):
            folders.sort()
            continue
        folders.clear()
        for below, _, inner in os.walk(folder):
            if below != parent:
                yield from _temporaries(Path(below), inner, now - older)
        store, sizes = Store(), Store().list(str(folder))
        entries = {name: (size, _written(folder / name)) for name, size in sizes.items()}
        yield from _of_artifact(store, str(folder), entries, folder.name in used, now - older, unused)


def bucket_leavings(store: Store, root: str, older: float) -> Iterator[Leaving]:
    """What may go below `s3://bucket/root`: temporaries, and of data folders the objects that no record lists.

    Finished data are never among them: which runs anywhere use a bucket is not known here.
    """
    before = time.time() - older
    folders: dict[str, dict[str, tuple[int, float]]] = {}
    for name, entry in sorted(store.entries(root).items()):
        above = name.split("/")[:-1]
        depth = next((i for i, part in enumerate(above, 1) if DATA_FOLDER.fullmatch(part)), 0)
        if is_temporary(name.rpartition("/")[2]):
            if entry[1] <= before:
                yield Leaving(join(root, name), entry[0], "a write that was not finished")
        elif depth:
            inner = "/".join(name.split("/")[depth:])
            folders.setdefault(join(root, *above[:depth]), {})[inner] = entry
        elif DATA_FOLDER.fullmatch(root.rstrip("/").rpartition("/")[2]):
            folders.setdefault(root.rstrip("/"), {})[name] = entry
    for folder, entries in folders.items():  # records are read after the list, so they know of whatever is on it
        yield from _of_artifact(store, folder, entries, used=True, before=before, unused=False)


def upload_leavings(store: Store, root: str, older: float) -> Iterator[Leaving]:
    """Uploads below `s3://bucket/root` that nothing was added to for `older` seconds. Raises StoreError if none can be listed."""
    before = time.time() - older
    for upload in store.open_uploads(root):
        if upload.written <= before:
            yield Leaving(upload.path, upload.bytes, "an upload that was not finished", upload=upload.id)


def _temporaries(folder: Path, names: Collection[str], before: float) -> Iterator[Leaving]:
    for name in sorted(names):
        if is_temporary(name) and not _writer_lives(name, folder / name, before):
            yield Leaving(str(folder / name), _size(folder / name), "a write that was not finished")


def _writer_lives(name: str, path: Path, before: float) -> bool:
    """Whether the process that a temporary name tells of may still write: it runs here, or elsewhere and lately."""
    found = re.search(r"\.(\d+)-[0-9a-f]+\.tmp$", name)
    try:
        if found is not None and os.path.exists("/proc/self"):
            lately = path.stat().st_mtime > before
            return lately if not os.path.exists(f"/proc/{found[1]}") else True
        return path.stat().st_mtime > before
    except FileNotFoundError:
        return True


def _of_artifact(
    store: Store, folder: str, entries: Mapping[str, tuple[int, float]], used: bool, before: float, unused: bool
) -> Iterator[Leaving]:
    """`entries`: its files, name -> bytes and when it was last written."""
    try:
        manifest = read_manifest(store, folder)
        parts = read_parts(store, folder)
    except (DamagedError, StoreError):
        return  # `verify` says what is wrong; nothing is deleted on a damaged record's word
    last = {name: written for name, (_, written) in entries.items()}
    # What is newer than the record of freeing belongs to an attempt to make the artifact again.
    if manifest is None and FREED in entries and max(last.values()) <= last[FREED]:
        for name in sorted(set(entries) - {FREED}):
            yield Leaving(join(folder, name), entries[name][0], "its folder was freed")
        return
    if manifest is not None and unused and not used:
        if max(last.values()) > before:
            return
        yield Leaving(folder, sum(size for size, _ in entries.values()), "no run here uses it", whole=True)
        return
    known = {file.name for part in parts.values() for file in part.files}
    if manifest is not None:
        known |= {file["name"] for file in manifest["files"]}
    for name in sorted(n for n in entries if n not in known and n not in _OWN and not n.startswith("parts/")):
        if last[name] <= before:
            why = "no record lists it" if manifest is not None else "an attempt that was lost: no record lists it"
            yield Leaving(join(folder, name), entries[name][0], why)


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def remove(leaving: Leaving, store: Store | None = None) -> None:
    """Delete it; of an artifact the manifest first. `store` reaches its bucket, if it is in one."""
    from plmsae_cli.store.manifest import delete_artifact

    store = store or Store()
    if leaving.upload is not None:
        store.abort_upload(leaving.path, leaving.upload)
    elif not leaving.whole:
        store.delete(leaving.path)
    else:
        delete_artifact(store, leaving.path)
        _prune(leaving.path)


def _prune(folder: str) -> None:
    """Remove the empty folders of a local artifact; S3 has none."""
    for parent, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # it is not empty, or another process has removed it
            os.rmdir(parent)
