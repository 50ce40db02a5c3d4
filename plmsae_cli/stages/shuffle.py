"""Activations to a global random order: the map half of a two-pass external shuffle.

Row r of the training numbering goes to place pi(r), a seeded bijection that every worker computes alone. A map task reads a
contiguous range of rows, sorts them by place and writes one file: `rows`, `places`, and `offsets` of fixed buckets of places,
so that `optimize` (the reduce half) finds any range of places as one contiguous segment of each file. Bytes: 1 R + 1 W here,
1 R + 1 W there. The blocks' bytes depend on (rows, seed, format) alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.runtime.task import Context, Plan, Resources, Result, Task
from plmsae_cli.stages.common import FINISH, artifact, finish_task, manifest_facts, read_plan, remaining
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.lineage import Lineage

PLACE_BYTES = 8
BUCKET_ROWS = 1024


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
        chosen = read_plan(store, ref.folder) or {
            "rows": rows,
            "map_rows": map_rows(int(shuffle.memory), row_bytes),
            "bucket_rows": BUCKET_ROWS,
        }
        step = chosen["map_rows"]
        maps = [
            Task(
                f"map-{i:05d}",
                "shuffle",
                (ref.folder,),
                resources=Resources(memory=int(shuffle.memory)),
                cost=float(min(step, rows - i * step)),
                args={
                    "source": lineage.embed(layer).folder,
                    "start": i * step,
                    "stop": min((i + 1) * step, rows),
                    "bucket_rows": chosen["bucket_rows"],
                    "rows": rows,
                    "seed": shuffle.seed,
                },
            )
            for i in range(math.ceil(rows / step))
        ]
        facts = {"rows": rows, "d": lineage.d, "layer": layer, **chosen}
        tasks += remaining(store, [*maps, finish_task("shuffle", [ref], maps, facts)])
        size = rows * (row_bytes + PLACE_BYTES)
        artifacts[f"layer-{layer}"] = artifact(store, ref, rows, size, chosen)
        figures[f"layer-{layer}"] = {
            "rows": rows,
            "maps": len(maps),
            "rows_per_map": step,
            "memory_per_task": int(shuffle.memory),
            "bytes_read": rows * row_bytes,
            "bytes_written": size,
        }
    return Plan("shuffle", tasks, artifacts, figures)


def map_rows(memory: int, row_bytes: int) -> int:
    """Rows a task holds: sorting copies them once, so rows twice and places three times fit `memory`."""
    return max(1, memory // (2 * row_bytes + 3 * PLACE_BYTES))


def work(task: Task, context: Context) -> Mapping[str, Result]:
    if task.id == FINISH:
        facts = {k: task.args[k] for k in ("rows", "d", "layer", "map_rows", "bucket_rows")}
        return {folder: manifest_facts(task, folder, facts) for folder in task.folders}
    return _map(task, context)


def _map(task: Task, context: Context) -> Mapping[str, Result]:
    import numpy as np
    import torch

    from plmsae_cli.store.activations import ActivationShards
    from plmsae_cli.store.permutation import Permutation
    from plmsae_cli.store.tensorfile import write_tensors

    start, stop = task.args["start"], task.args["stop"]
    shards = ActivationShards(context.store, task.args["source"])
    rows_RD = torch.empty(stop - start, shards.d, dtype=shards.dtype)
    shards.read_into(start, rows_RD)
    context.progress(1, 3)
    context.check_stop()
    places_R = Permutation(task.args["rows"], task.args["seed"], domain="shuffle")(
        np.arange(start, stop, dtype=np.int64)
    )
    order_R = np.argsort(places_R)  # places are distinct: every sort gives the same order
    places_R = places_R[order_R]
    num_buckets = math.ceil(task.args["rows"] / task.args["bucket_rows"])
    offsets = np.searchsorted(places_R, np.arange(num_buckets + 1, dtype=np.int64) * task.args["bucket_rows"])
    sorted_RD = rows_RD.index_select(0, torch.from_numpy(order_R))
    del rows_RD
    context.progress(2, 3)
    (folder,) = task.folders
    record = write_tensors(
        context.store,
        join(folder, f"{task.id}.safetensors"),
        {
            "offsets": torch.from_numpy(offsets.astype(np.int64)),
            "places": torch.from_numpy(places_R),
            "rows": sorted_RD,
        },
        {"start": str(start), "stop": str(stop), "bucket_rows": str(task.args["bucket_rows"])},
    )
    context.progress(3, 3)
    return {folder: Result([record], {"rows": stop - start})}
