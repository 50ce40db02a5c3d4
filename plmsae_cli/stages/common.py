"""What all data stages share: which tasks are left, the choices fixed by the first start, the closing manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.runtime.task import Artifact, Result, Task
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.lineage import Ref
from plmsae_cli.store.manifest import done_tasks, read_manifest

FINISH = "finish"


def read_plan(store: Store, folder: str) -> dict[str, Any] | None:
    """plan.json of an artifact that was started, else None."""
    path = join(folder, "plan.json")
    return json.loads(store.read(path)) if store.exists(path) else None


def remaining(store: Store, tasks: Iterable[Task]) -> list[Task]:
    """The tasks that are not done, each cut to the folders that lack its record.

    A folder with a manifest lacks nothing; one without lacks at least its finish, even if that left a record before it was
    killed.
    """
    known: dict[str, set[str] | None] = {}
    left = []
    for task in tasks:
        for folder in task.folders:
            if folder not in known:
                known[folder] = None if read_manifest(store, folder) is not None else done_tasks(store, folder)
        lacking = tuple(
            f for f in task.folders if (done := known[f]) is not None and (task.id == FINISH or task.id not in done)
        )
        if lacking:
            left.append(replace(task, folders=lacking))
    ids = {task.id for task in left}
    return [replace(task, needs=tuple(n for n in task.needs if n in ids)) for task in left]


def artifact(store: Store, ref: Ref, rows: int, size: int, plan: Mapping[str, Any]) -> Artifact:
    return Artifact(ref.folder, ref.key, read_manifest(store, ref.folder) is not None, rows, size, plan)


def finish_task(stage: str, refs: Sequence[Ref], tasks: Sequence[Task], facts: Mapping[str, Any]) -> Task:
    """The last task of a stage: merges and writes the manifest of each folder."""
    return Task(
        id=FINISH,
        stage=stage,
        folders=tuple(ref.folder for ref in refs),
        needs=tuple(task.id for task in tasks),
        cost=1.0,
        args={"provenance": {ref.folder: ref.provenance() for ref in refs}, **facts},
    )


def manifest_facts(task: Task, folder: str, facts: Mapping[str, Any]) -> Result:
    """The result of a finish task for one folder: its facts become the manifest's fields."""
    return Result(facts={**task.args["provenance"][folder], **facts})


def require_manifest(store: Store, folder: str) -> dict[str, Any]:
    """The manifest of an artifact that must be finished by now."""
    manifest = read_manifest(store, folder)
    if manifest is None:
        raise UserError(
            f"{folder} is not finished: it has no MANIFEST.json",
            "run the stage that makes it, or the whole experiment with `plmsae run`",
        )
    return manifest
