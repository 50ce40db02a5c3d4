"""What all data stages share: which tasks are left, the choices fixed by the first start, the closing manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from plmsae_cli.config.data import Embed
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.runtime.task import Artifact, Result, Task
from plmsae_cli.store.fs import DamagedError, MissingError, Store, StoreError, is_remote, join
from plmsae_cli.store.lineage import Lineage, Ref
from plmsae_cli.store.manifest import Part, done_tasks, read_manifest, read_parts, verify
from plmsae_cli.store.passes import Effort, Passes, divide, sorted_shards

FINISH = "finish"
CALIBRATION_ROWS = 1_000_000
"""Rows that the means and deviations of int8 are taken from."""
_SAMPLED_PARTS = 32


def read_plan(store: Store, folder: str) -> dict[str, Any] | None:
    """plan.json of an artifact that was started, else None."""
    try:
        found: dict[str, Any] = json.loads(store.read(join(folder, "plan.json")))
    except MissingError:
        return None
    return found


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
    freed = {name for task in tasks for name in task.args.get("freed", ())}
    made = {ref.folder: [t.id for t in tasks if ref.folder in t.folders and t.id not in freed] for ref in refs}
    return Task(
        id=FINISH,
        stage=stage,
        folders=tuple(ref.folder for ref in refs),
        needs=tuple(task.id for task in tasks),
        cost=1.0,
        args={"provenance": {ref.folder: ref.provenance() for ref in refs}, "made": made, **facts},
    )


def made_parts(task: Task, store: Store, folder: str) -> dict[str, Part]:
    """What a finish task finds done: the record of every task of its folder, and its own where it is there.

    Raises:
        StoreError: one is not there, though its task was done: whoever freed or cleaned the folder has deleted it.
    """
    parts = read_parts(store, folder, known=[*task.args["made"][folder], FINISH])
    if lacking := [name for name in task.args["made"][folder] if name not in parts]:
        raise StoreError(
            f"{folder} has no record of {lacking[0]} any more ({len(lacking)} missing)",
            "start again: what is gone is made anew",
        )
    return parts


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


def effort_figures(effort: Effort, experiment: Experiment, folder: str, measured: float | None) -> dict[str, Any]:
    """What a stage moves, how long that takes at which speed, and what it costs where prices are known."""
    given = experiment.launch.io_speed
    speed, origin = (
        (float(given), "launch.io_speed") if given else (measured, "measured") if measured else (1e9, "assumed")
    )
    found: dict[str, Any] = {
        "files": effort.files,
        "bytes_read": effort.bytes_read,
        "bytes_written": effort.bytes_written,
        "bytes_temporary": effort.temporary_bytes,
        "predicted_seconds": round(effort.seconds(speed), 1),
        "bytes_a_second": f"{speed / 1e6:,.0f} MB each way, {origin}",
    }
    return found | price_figures(experiment, folder, effort.requests, effort.bytes_written)


def price_figures(experiment: Experiment, folder: str, requests: int, bytes_written: int) -> dict[str, Any]:
    """Requests to a bucket, and what they and a day of keeping the bytes cost where prices are known."""
    price, found = experiment.price, dict[str, Any]()
    if is_remote(folder):
        found["requests"] = requests
        if price.million_requests is not None:
            found["usd_requests"] = round(requests / 1e6 * price.million_requests, 2)
    if price.tb_day is not None:
        found["usd_storage_a_day"] = round(bytes_written / 1e12 * price.tb_day, 2)
    return found


def embedded_files(embed: Embed, shards: int, with_rows: int) -> int:
    """Files of one layer's activations, where `with_rows` of the shards have a file of training rows."""
    # A shard: held-out rows, statistics, its record, perhaps means; once: proteins and statistics, two records, plan,
    # manifest; of int8 the calibration and its record.
    return with_rows + (3 + embed.pooled) * shards + 6 + 2 * (embed.dtype == "int8")


def measured_speed(store: Store, folder: str, before: str | None = None) -> float | None:
    """Bytes a second each way of an artifact's finished tasks (a few will do), else of the artifact before it."""
    facts = [manifest for f in (folder, before) if f is not None and (manifest := read_manifest(store, f)) is not None][
        :1
    ]
    facts = facts or [dict(part.facts) for part in _some_parts(store, folder)]
    timed = [(float(f["bytes"]), float(f["seconds"])) for f in facts if f.get("seconds") and f.get("bytes")]
    # A task reads as many bytes as it writes.
    return sum(size for size, _ in timed) / sum(seconds for _, seconds in timed) if timed else None


def _some_parts(store: Store, folder: str) -> list[Part]:
    try:
        return list(read_parts(store, folder, most=_SAMPLED_PARTS).values())
    except DamagedError:  # its task is done again
        return []


def measured_facts(store: Store, folder: str) -> dict[str, Any]:
    """What the tasks of a finished artifact took, for its figures."""
    manifest = read_manifest(store, folder) or {}
    names = {"seconds_measured": "seconds", "memory_measured": "peak_memory"}
    return {shown: manifest[name] for shown, name in names.items() if name in manifest}


def require_same_rows(store: Store, source: str, before: str | None, parts: Sequence[Part]) -> dict[str, Any]:
    """What the parts say together: the checksum of their rows, which must be that of the source, time and memory.

    Raises:
        DamagedError: a row was changed between the two; the source is read again to name the file.
    """
    from plmsae_cli.store.rowsum import joined  # numpy: planning needs none

    total = joined(part.facts["row_sum"] for part in parts)
    if before is not None and total != before:
        problems = verify(store, source)
        raise DamagedError(
            f"the rows read from {source} are not those that were written to it"
            + (":\n  " + "\n  ".join(problems) if problems else "; its files are sound now"),
            f"`plmsae verify {source}` says how to make a damaged file again; then delete the folder this stage has begun"
            if problems
            else "memory or a disk is faulty: delete the folder this stage has begun and start again, on another machine",
        )
    return {
        "row_sum": total,
        "seconds": round(sum(part.facts["seconds"] for part in parts), 3),
        "bytes": sum(part.facts["bytes"] for part in parts),
        "peak_memory": max((part.facts["peak_memory"] for part in parts), default=0),
    }


def shuffle_passes(experiment: Experiment, lineage: Lineage, store: Store, layer: int) -> Passes:
    """The shape of a layer's shuffle: as its first start fixed it, else as this one would."""
    assert experiment.shuffle is not None
    assert experiment.embed is not None
    folder = lineage.shuffle(layer).folder
    rows = lineage.scan.num_rows
    chosen = read_plan(store, folder)
    if chosen is None and experiment.embed.layout == "bucketed":
        ranges, _ = shard_ranges(store, lineage, {layer: [lineage.embed(layer).folder]})
        return shape_of_shards(lineage, ranges)
    if chosen is None:
        return divide(rows, lineage.row_bytes, int(experiment.shuffle.memory), is_remote(folder))
    return as_passes({"rows": rows, **chosen})


def as_passes(body: Mapping[str, Any]) -> Passes:
    """From plan.json or a manifest; those written before there were middle passes have none."""
    more = (body.get("fan", 0), body.get("middle", 0), body["bucket_rows"], body.get("maps", 0))
    return Passes(body["rows"], body["map_rows"], *more)


def passes_json(passes: Passes) -> dict[str, int]:
    """For plan.json and the manifest: what `as_passes` reads."""
    found = {"rows": passes.rows, "map_rows": passes.map_rows, "bucket_rows": passes.first_bucket_rows}
    found |= {"fan": passes.fan, "middle": passes.middle}
    return found | ({"maps": passes.maps} if passes.maps else {})


def shard_ranges(store: Store, lineage: Lineage, folders: Mapping[int, Sequence[str]]) -> tuple[list[list[int]], bool]:
    """The proteins of each shard of `embed`, and whether an earlier start fixed them.

    Args:
        folders: those that a layer's shards are written to; all layers of one pass share the ranges.
    """
    started = {
        layer: plan["ranges"]
        for layer, own in folders.items()
        for folder in own
        if "ranges" in (plan := read_plan(store, folder) or {})
    }
    if not started:
        embed = lineage.experiment.embed
        assert embed is not None
        return [list(r) for r in lineage.scan.shard_ranges(max(1, int(embed.shard) // lineage.row_bytes))], False
    first, *others = started.items()
    for layer, ranges in others:
        if ranges != first[1]:
            raise UserError(
                f"layers {first[0]} and {layer} were begun with different shard sizes and cannot share a pass",
                "embed them with two experiments, each with its own layers",
            )
    return [list(r) for r in first[1]], True


def shape_of_shards(lineage: Lineage, ranges: Sequence[Sequence[int]]) -> Passes:
    """The shuffle's shape where `embed` sorts these shards."""
    from plmsae_cli.store.sorted_shard import training_rows  # numpy: planning a plain shuffle needs none

    return sorted_shards(training_rows(lineage.scan, ranges))


def require_layout(store: Store, folder: str, layout: str) -> None:
    """Raises UserError where a shuffle that is not finished was begun under the other layout."""
    chosen = None if read_manifest(store, folder) is not None else read_plan(store, folder)
    begun = None if chosen is None else "bucketed" if "ranges" in chosen else "plain"
    if begun not in (None, layout):
        raise UserError(
            f"{folder} was begun with embed.layout: {begun} and is not finished",
            f"finish it with layout: {begun}, or delete the folder",
        )
