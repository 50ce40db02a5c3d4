"""Activations to a global random order: the map half of an external shuffle, and its middle passes where one map does not do.

Row r of the training numbering goes to place pi(r), a seeded bijection that every worker computes alone. A map task reads a
contiguous range of rows, sorts them by place and writes one file: `rows`, `places`, and `offsets` of fixed buckets of places,
so that `optimize` (the reduce half) finds any range of places as one contiguous segment of each file. Bytes: 1 R + 1 W here,
1 R + 1 W there. Beyond what two passes can do, merges cut the places into slices (the same code on the top bits of the place)
and free the files before them. The blocks' bytes depend on (rows, seed, format) alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.runtime.task import Context, Plan, Resources, Result, Task
from plmsae_cli.stages.common import (
    FINISH,
    artifact,
    as_passes,
    effort_figures,
    finish_task,
    made_parts,
    manifest_facts,
    measured_facts,
    measured_speed,
    passes_json,
    read_plan,
    remaining,
    require_layout,
    require_manifest,
    require_same_rows,
    shuffle_passes,
)
from plmsae_cli.store.fs import Store
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import delete_parts, done_tasks, read_manifest
from plmsae_cli.store.passes import Level, Passes, shuffle_effort, task_memory

_BY_EMBED = "embed writes its files, layout: bucketed"
_NOTHING = {"files": 0, "bytes_read": 0, "bytes_written": 0}


def plan(experiment: Experiment, store: Store, layers: Sequence[int] | None = None) -> Plan:
    embed, shuffle = experiment.embed, experiment.shuffle
    assert embed is not None
    assert shuffle is not None
    lineage = Lineage(experiment, store)
    rows, row_bytes = lineage.scan.num_rows, lineage.row_bytes
    tasks: list[Task] = []
    artifacts = {}
    figures = {}
    for layer in embed.layers if layers is None else layers:
        ref = lineage.shuffle(layer)
        require_layout(store, ref.folder, embed.layout)
        passes = shuffle_passes(experiment, lineage, store, layer)
        chosen = passes_json(passes)
        if embed.layout == "bucketed":
            # Its bytes are among those that embed's plan foretells.
            artifacts[f"layer-{layer}"] = replace(artifact(store, ref, rows, 0, chosen), plan=None)
            figures[f"layer-{layer}"] = {"rows": rows, "maps": passes.levels()[0].groups, **_NOTHING}
            continue
        source = lineage.embed(layer).folder
        memory = int(shuffle.memory)
        asked = memory if passes.middle else task_memory(passes.map_rows, row_bytes, memory)
        each = level_tasks(passes, ref.folder, source, shuffle.seed, asked)
        facts = {"d": lineage.d, "layer": layer, "source": source, **chosen}
        needed = [task for level in each for task in level]
        if passes.middle:
            needed = _not_superseded(store, ref.folder, each)
        tasks += remaining(store, [*needed, finish_task("shuffle", [ref], needed, facts)])
        effort = shuffle_effort(passes, row_bytes, int(embed.shard))
        artifacts[f"layer-{layer}"] = artifact(
            store, ref, rows, rows * (row_bytes + 8), read_plan(store, ref.folder) or chosen
        )
        figures[f"layer-{layer}"] = {
            "rows": rows,
            "passes": passes.count,
            "maps": passes.levels()[0].groups,
            "rows_per_map": passes.map_rows,
            "buckets_per_map": -(-rows // passes.first_bucket_rows),
            **({"merges": sum(level.num_files for level in passes.levels()[1:])} if passes.middle else {}),
            "memory_per_task": memory,
            **effort_figures(effort, experiment, ref.folder, measured_speed(store, ref.folder)),
            **measured_facts(store, ref.folder),
        }
    return Plan("shuffle", tasks, artifacts, figures, _BY_EMBED if embed.layout == "bucketed" else "")


def level_tasks(passes: Passes, folder: str, source: str, seed: int, memory: int) -> list[list[Task]]:
    """The tasks of each level; from the second on the last of a level frees the files of the one before."""
    levels = passes.levels()
    step, rows = passes.map_rows, passes.rows
    shape = {**passes_json(passes), "seed": seed}
    held = Resources(memory=memory)
    maps = [
        Task(
            levels[0].name(0, i),
            "shuffle",
            (folder,),
            resources=held,
            cost=float(min(step, rows - i * step)),
            args={
                **shape,
                "source": source,
                "start": i * step,
                "stop": min((i + 1) * step, rows),
                "level": 0,
                "group": i,
            },
        )
        for i in range(levels[0].groups)
    ]

    def merged(group: int, before: Level) -> range:
        return range(group * passes.fan, min((group + 1) * passes.fan, before.groups))

    found = [maps]
    for before, level in pairwise(levels):
        merges = [
            Task(
                level.name(part, group),
                "shuffle",
                (folder,),
                needs=tuple(before.name(p, g) for p in before.parts(*level.span(part)) for g in merged(group, before)),
                resources=held,
                cost=float(rows / level.num_files),
                args={
                    **shape,
                    "level": level.number,
                    "slice": part,
                    "group": group,
                    "merged": list(merged(group, before)),
                },
            )
            for part in range(level.slices)
            for group in range(level.groups)
        ]
        freed = [t.id for t in found[-1] if not t.id.startswith("free")]
        free = Task(
            f"free-{before.number}",
            "shuffle",
            (folder,),
            needs=tuple(task.id for task in merges),
            args={"freed": freed},
        )
        found.append([*merges, free])
    return found


def _not_superseded(store: Store, folder: str, each: Sequence[Sequence[Task]]) -> list[Task]:
    """What is left of the levels once a later one is complete: its own tasks, none of those whose files it replaced."""
    done = done_tasks(store, folder) if read_manifest(store, folder) is None else set()
    first = 0
    for number, level in enumerate(each):
        if all(task.id in done for task in level if not task.id.startswith("free")):
            first = number
    # A free task that was overtaken still has its level to free.
    return [*(level[-1] for level in each[1:first]), *(task for level in each[first:] for task in level)]


def work(task: Task, context: Context) -> Mapping[str, Result]:
    from plmsae_cli.runtime.peak import reset_peak

    reset_peak()
    if task.id == FINISH:
        return _finish(task, context)
    if task.id.startswith("free-"):
        (folder,) = task.folders
        delete_parts(context.store, folder, task.args["freed"])
        return {folder: Result()}
    return _map(task, context) if task.args["level"] == 0 else _merge(task, context)


def _map(task: Task, context: Context) -> Mapping[str, Result]:
    import numpy as np

    from plmsae_cli.store.activations import ActivationShards
    from plmsae_cli.store.memory import BUFFERS
    from plmsae_cli.store.permutation import Permutation

    begun = time.monotonic()
    start, stop = task.args["start"], task.args["stop"]
    shards = ActivationShards(context.store, task.args["source"])
    rows_RD = BUFFERS.rows(stop - start, shards.width, shards.dtype, shards.place(start))
    shards.read_into(start, rows_RD)
    shards.prefetch(stop, 2 * stop - start)
    context.progress(1, 3)
    context.check_stop()
    places_R = Permutation(task.args["rows"], task.args["seed"], domain="shuffle")(
        np.arange(start, stop, dtype=np.int64)
    )
    return _written(task, context, rows_RD, places_R, begun)


def _merge(task: Task, context: Context) -> Mapping[str, Result]:
    """The files of some groups, for one slice of the places, into one file."""
    from plmsae_cli.store.buckets import Buckets

    begun = time.monotonic()
    levels = as_passes(task.args).levels()
    (folder,) = task.folders
    buckets = Buckets(context.store, folder, levels[task.args["level"] - 1], task.args["merged"])
    rows_RD, places_R = buckets.load(*levels[task.args["level"]].span(task.args["slice"]))
    context.progress(1, 3)
    context.check_stop()
    return _written(task, context, rows_RD, places_R, begun)


def _written(task: Task, context: Context, rows_RD: Any, places_R: Any, begun: float) -> Mapping[str, Result]:
    from plmsae_cli.runtime.peak import peak_memory
    from plmsae_cli.store.buckets import write_sorted
    from plmsae_cli.store.memory import BUFFERS
    from plmsae_cli.store.rowsum import hexed

    (folder,) = task.folders
    level = as_passes(task.args).levels()[task.args["level"]]
    part = task.args.get("slice", 0)
    record, total = write_sorted(context.store, folder, level, part, task.args["group"], rows_RD, places_R)
    BUFFERS.give(rows_RD)
    context.progress(3, 3)
    facts = {"rows": len(places_R), "row_sum": hexed(total), "bytes": record.size}
    return {folder: Result([record], {**facts, "seconds": time.monotonic() - begun, "peak_memory": peak_memory()})}


def _finish(task: Task, context: Context) -> Mapping[str, Result]:
    results = {}
    for folder in task.folders:
        last = as_passes(task.args).levels()[-1]
        stem = "map-" if last.number == 0 else f"merge{last.number}-"
        parts = [part for part in made_parts(task, context.store, folder).values() if part.task.startswith(stem)]
        if (found := sum(part.facts["rows"] for part in parts)) != task.args["rows"]:
            raise UserError(
                f"{folder} has {found:,} of {task.args['rows']:,} rows",
                "delete the folder: the next start makes it anew",
            )
        source = require_manifest(context.store, task.args["source"])
        facts = require_same_rows(context.store, task.args["source"], source.get("row_sum"), parts)
        kept = ("rows", "d", "layer", "map_rows", "bucket_rows", "fan", "middle")
        results[folder] = manifest_facts(task, folder, {**{k: task.args[k] for k in kept}, **facts})
    return results
