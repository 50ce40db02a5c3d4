"""Shuffled rows to a streamable dataset: the reduce half, writing LitData chunks.

A task fills the places of one or more whole chunks from all map files. `finish` copies what makes the folder self-sufficient
(statistics, proteins, held-out rows) and writes index.json last of the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.runtime.task import Context, Plan, Resources, Result, Task
from plmsae_cli.stages.common import FINISH, artifact, finish_task, manifest_facts, read_plan, remaining
from plmsae_cli.store.blocks import chunk_name, chunk_rows
from plmsae_cli.store.fs import FileRecord, Store, join
from plmsae_cli.store.lineage import Lineage


def plan(experiment: Experiment, store: Store, layers: Sequence[int] | None = None) -> Plan:
    import torch

    embed, shuffle, optimize = experiment.embed, experiment.shuffle, experiment.optimize
    assert embed is not None
    assert shuffle is not None
    assert optimize is not None
    lineage = Lineage(experiment, store)
    rows, d = lineage.scan.num_rows, lineage.d
    row_bytes = lineage.row_bytes
    tasks: list[Task] = []
    artifacts = {}
    figures = {}
    for layer in embed.layers if layers is None else layers:
        ref = lineage.optimize(layer)
        per_chunk = chunk_rows(int(optimize.chunk), optimize.block_rows, d, getattr(torch, embed.dtype))
        num_chunks = math.ceil(rows / per_chunk)
        # Half the memory holds the chunks being filled, the other half the segment being read.
        fitting = max(1, int(shuffle.memory) // 2 // (per_chunk * row_bytes))
        chosen = read_plan(store, ref.folder) or {"rows": rows, "chunk_rows": per_chunk, "chunks_per_task": fitting}
        step = chosen["chunks_per_task"]
        reduces = [
            Task(
                f"reduce-{i:05d}",
                "optimize",
                (ref.folder,),
                resources=Resources(memory=int(shuffle.memory)),
                cost=float(min(step * per_chunk, rows - i * step * per_chunk)),
                args={
                    "source": lineage.shuffle(layer).folder,
                    "first": i * step,
                    "last": min((i + 1) * step, num_chunks),
                    "chunk_rows": per_chunk,
                    "rows": rows,
                },
            )
            for i in range(math.ceil(num_chunks / step))
        ]
        facts = {
            "layer": layer,
            "rows": rows,
            "d": d,
            "chunk_rows": per_chunk,
            "activations": lineage.embed(layer).folder,
        }
        tasks += remaining(store, [*reduces, finish_task("optimize", [ref], reduces, facts)])
        artifacts[f"layer-{layer}"] = artifact(store, ref, rows, rows * row_bytes, chosen)
        figures[f"layer-{layer}"] = {
            "rows": rows,
            "chunks": num_chunks,
            "chunk_bytes": per_chunk * row_bytes,
            "reduces": len(reduces),
            "bytes_read": rows * (row_bytes + 8),
            "bytes_written": rows * row_bytes,
        }
    return Plan("optimize", tasks, artifacts, figures)


def work(task: Task, context: Context) -> Mapping[str, Result]:
    return _finish(task, context) if task.id == FINISH else _reduce(task, context)


def _reduce(task: Task, context: Context) -> Mapping[str, Result]:
    import torch

    from plmsae_cli.stages.common import require_manifest
    from plmsae_cli.store.blocks import write_chunk
    from plmsae_cli.store.buckets import Buckets

    source = task.args["source"]
    manifest = require_manifest(context.store, source)
    names = [file["name"] for file in manifest["files"] if file["name"].startswith("map-")]
    buckets = Buckets(context.store, source, names, manifest["bucket_rows"])
    first, last, per_chunk = task.args["first"], task.args["last"], task.args["chunk_rows"]
    start, stop = first * per_chunk, min(last * per_chunk, task.args["rows"])
    rows_RD = torch.empty(stop - start, buckets.d, dtype=buckets.dtype)
    buckets.gather(start, rows_RD)
    (folder,) = task.folders
    files = []
    for chunk in range(first, last):
        context.check_stop()
        low = (chunk - first) * per_chunk
        files.append(write_chunk(context.store, join(folder, chunk_name(chunk)), rows_RD[low : low + per_chunk]))
        context.progress(chunk + 1 - first, last - first)
    return {folder: Result(files, {"rows": stop - start})}


def _finish(task: Task, context: Context) -> Mapping[str, Result]:
    import torch

    from plmsae_cli.stages.common import require_manifest
    from plmsae_cli.store.blocks import index_json

    store = context.store
    (folder,) = task.folders
    source = task.args["activations"]
    activations = require_manifest(store, source)
    copies: list[FileRecord] = []
    for file in activations["files"]:
        name = file["name"]
        if name in ("proteins.parquet", "stats.safetensors") or name.startswith("heldout/"):
            copies.append(store.write(join(folder, name), [store.read(join(source, name))]))
    rows, per_chunk, d = task.args["rows"], task.args["chunk_rows"], task.args["d"]
    chunks = [(chunk_name(i), min(per_chunk, rows - i * per_chunk)) for i in range(math.ceil(rows / per_chunk))]
    index = index_json(chunks, d, getattr(torch, activations["dtype"]))
    records = [*copies, store.write(join(folder, "index.json"), [index])]
    keep = ("layer", "num_layers", "weights", "fasta", "dtype", "heldout_rows", "counts")
    facts = {"rows": rows, "d": d, "chunk_rows": per_chunk, **{k: activations[k] for k in keep}}
    shuffled = {"seed": context.experiment.shuffle.seed} if context.experiment.shuffle else {}
    return {folder: Result(records, manifest_facts(task, folder, {**facts, **shuffled}).facts)}
