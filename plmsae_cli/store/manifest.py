"""How an artifact comes to exist: task by task its parts, then one manifest.

A task writes its files, then `parts/<task>.json` with their sizes and hashes; the last task writes
`MANIFEST.json`. A folder with a manifest is an artifact, a folder without one is work in progress. Work
resumes by names and sizes alone; `verify` reads every byte again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from plmsae_cli.store.fs import DamagedError, FileRecord, MissingError, Store, StoreError, each, join

MANIFEST = "MANIFEST.json"
_PARTS = "parts"


@dataclass(frozen=True)
class Part:
    """What one task made: its files, named relative to the artifact's folder, and facts for the last task."""

    task: str
    files: list[FileRecord]
    facts: dict[str, Any] = field(default_factory=dict)


def canonical_json(body: Mapping[str, Any]) -> bytes:
    """The one way `body` is written: sorted keys, UTF-8, no NaN; equal content is equal bytes."""
    return (json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_part(store: Store, folder: str, task_id: str, files: Sequence[FileRecord], facts: Mapping[str, Any]) -> None:
    """Declare the task done. `files` are as `Store.write` returned them, with paths below `folder`.

    If another attempt of the task was declared first and its files are all there, that one stands. Files of its that we
    wrote over with other bytes (a model rounds differently on another machine) are read again to find that out.
    """
    prefix = join(folder, "x")[:-1]
    assert all(file.name.startswith(prefix) for file in files), f"files outside {folder}"
    relative = [FileRecord(file.name.removeprefix(prefix), file.size, file.xxh3) for file in files]
    path = join(folder, _PARTS, f"{task_id}.json")
    data = canonical_json(asdict(Part(task_id, relative, dict(facts))))
    if store.write_once(path, data):
        return
    try:
        earlier = _parse_part(path, store.read(path))
        ours = set(relative)
        over = {file.name for file in relative}
        complete = all(
            differs(store, folder, file) is None
            if file.name in over and file not in ours
            else store.size(join(folder, file.name)) == file.size
            for file in earlier.files
        )
    except (DamagedError, MissingError):
        complete = False
    if not complete:
        store.write(path, [data])


def read_parts(store: Store, folder: str, most: int | None = None, known: Iterable[str] = ()) -> dict[str, Part]:
    """Every task's part by the task's id. A damaged record is a DamagedError.

    Args:
        most: of the first so many alone.
        known: tasks whose records are looked for by name, too: a list of a network disk may lag behind what another machine
            has written. One without a record is absent all the same.
    """

    def load(name: str) -> Part | None:
        path = join(folder, _PARTS, name)
        try:
            return _parse_part(path, store.read(path))
        except MissingError:  # withdrawn since it was listed, by a worker that does its task again
            return None

    names = {name for name in store.list(join(folder, _PARTS)) if name.endswith(".json")}
    names |= {f"{task}.json" for task in known}
    found = [part for part in each(folder, load, sorted(names)[:most]) if part is not None]
    return {part.task: part for part in found}


def done_tasks(store: Store, folder: str) -> set[str]:
    """Tasks that are done: those whose record is sound and whose files are there, with their sizes.

    One listing and the records are read, no data.
    """
    sizes = store.list(folder)

    def load(name: str) -> Part | None:
        path = join(folder, name)
        try:
            return _parse_part(path, store.read(path))
        except (
            DamagedError,
            MissingError,
        ):  # the task is done again and its record replaced, or was withdrawn for that
            return None

    names = [name for name in sizes if name.startswith(f"{_PARTS}/") and name.endswith(".json")]
    parts = [part for part in each(folder, load, names) if part is not None]
    return {part.task for part in parts if all(sizes.get(file.name) == file.size for file in part.files)}


def delete_parts(store: Store, folder: str, tasks: Iterable[str]) -> None:
    """Remove the files of these tasks and the tasks' records."""
    for task_id in tasks:
        path = join(folder, _PARTS, f"{task_id}.json")
        try:
            files = _parse_part(path, store.read(path)).files
        except MissingError:
            continue
        # The record goes last: killed between the two, the next start finds the record and goes on.
        for file in files:
            store.delete(join(folder, file.name))
        store.delete(path)


def write_manifest(store: Store, folder: str, body: Mapping[str, Any]) -> None:
    """Write `MANIFEST.json`, which makes the folder an artifact: to be called last.

    `body` has at least format, stage, key, config, inputs, created and files: [{name, size, xxh3}]. Of several that finish the
    same artifact at once the first one's manifest stands.

    Raises:
        StoreError: a file is not there any more, or the manifest came back different.
    """
    path = join(folder, MANIFEST)
    _require_files(store, folder, file_records(path, body))
    data = canonical_json(body)
    if not store.write_once(path, data):
        if _says_the_same(store, path, body):
            return
        store.write(path, [data])
    if store.read(path) != data and not _says_the_same(store, path, body):
        store.delete(path)
        raise StoreError(
            f"{path} came back different from what was written; it was removed",
            hint="the disk or the server is faulty: check it, then start again",
        )


def _require_files(store: Store, folder: str, files: Sequence[FileRecord]) -> None:
    """Raises StoreError where what a task has recorded is gone, or other bytes are there: whoever is late may find the folder
    freed, cleaned, or made anew."""
    sizes = store.list(folder)

    def lacks(file: FileRecord) -> bool:
        if sizes.get(file.name) == file.size:
            return False
        try:  # a list may lag behind what another machine has written
            return store.size(join(folder, file.name)) != file.size
        except MissingError:
            return True

    for file in files:
        if lacks(file):
            raise StoreError(
                f"{join(folder, file.name)} is not there as its task wrote it: it was deleted or replaced meanwhile",
                hint="start again: what is gone is made anew",
            )


def _says_the_same(store: Store, path: str, body: Mapping[str, Any]) -> bool:
    """Whether the manifest that is there is of the same files; when they were made, and how long it took, may differ."""
    try:
        there = _parse(path, store.read(path))
        return there.get("key") == body["key"] and file_records(path, there) == file_records(path, body)
    except (DamagedError, MissingError):
        return False


def read_manifest(store: Store, folder: str) -> dict[str, Any] | None:
    """The manifest's body; None if the folder is not an artifact (yet). A damaged one is a DamagedError."""
    path = join(folder, MANIFEST)
    try:
        data = store.read(path)
    except MissingError:
        return None
    body = _parse(path, data)
    file_records(path, body)
    return body


def verify(store: Store, folder: str) -> list[str]:
    """Read every file of the artifact again; one line for each that is missing or differs, naming it.

    Files the manifest does not know are no problem.
    """
    manifest = read_manifest(store, folder)
    if manifest is None:
        return [f"{join(folder, MANIFEST)}: missing"]
    records = file_records(join(folder, MANIFEST), manifest)
    return [f"{join(folder, r.name)}: {problem}" for r in records if (problem := differs(store, folder, r)) is not None]


def differs(store: Store, folder: str, wanted: FileRecord) -> str | None:
    """Read a file of `folder` again: `missing`, or how it is not what was recorded; None if it is."""
    try:
        found = store.hash(join(folder, wanted.name))
    except MissingError:
        return "missing"
    if found.size != wanted.size:
        return f"size differs, {wanted.size} bytes recorded, {found.size} found"
    if found.xxh3 != wanted.xxh3:
        return f"content differs, xxh3 {wanted.xxh3} recorded, {found.xxh3} found"
    return None


def delete_artifact(store: Store, folder: str) -> None:
    """Remove everything below `folder`, the manifest first: no half-deleted folder passes for an artifact."""
    store.delete(join(folder, MANIFEST))
    for name in store.list(folder):
        store.delete(join(folder, name))


def _parse(path: str, data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(body, dict):
        raise _damaged(path, "it is not a JSON object")
    return body


def _parse_part(path: str, data: bytes) -> Part:
    body = _parse(path, data)
    facts = body.get("facts")
    if not isinstance(body.get("task"), str) or not isinstance(facts, dict):
        raise _damaged(path, "it lacks `task` or `facts`")
    return Part(body["task"], file_records(path, body), facts)


def file_records(path: str, body: Mapping[str, Any]) -> list[FileRecord]:
    """What the manifest or part record at `path` lists."""
    try:
        records = [FileRecord(str(f["name"]), int(f["size"]), str(f["xxh3"])) for f in body["files"]]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, "its `files` are not a list of name, size, xxh3") from error
    for record in records:
        join("", record.name)  # others' manifests must not lead out of their folder
    return records


def _damaged(path: str, reason: str) -> DamagedError:
    return DamagedError(f"{path} is damaged: {reason}", hint="delete it and start again: it is then made anew")
