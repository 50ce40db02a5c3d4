"""Shuffled rows to a streamable dataset: the reduce half, writing LitData chunks.

A task fills the places of one or more whole chunks from all map files. `finish` copies what makes the folder self-sufficient
(statistics, proteins, held-out rows) and writes index.json last of the data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

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
    read_plan,
    remaining,
    require_manifest,
    require_same_rows,
    shuffle_passes,
)
from plmsae_cli.store.blocks import chunk_name, chunk_rows
from plmsae_cli.store.fs import DamagedError, FileRecord, MissingError, Store, is_remote, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.passes import chunks_per_task, held_rows, optimize_effort, task_memory, window_rows

_COPIED = 32 << 20
"""Bytes of a file that are copied at a time."""


def plan(experiment: Experiment, store: Store, layers: Sequence[int] | None = None) -> Plan:
    import torch

    embed, shuffle, optimize = experiment.embed, experiment.shuffle, experiment.optimize
    assert embed is not None
    assert shuffle is not None
    assert optimize is not None
    lineage = Lineage(experiment, store)
    rows, row_bytes = lineage.scan.num_rows, lineage.row_bytes
    memory = int(shuffle.memory)
    tasks: list[Task] = []
    artifacts = {}
    figures = {}
    for layer in embed.layers if layers is None else layers:
        ref, source = lineage.optimize(layer), lineage.shuffle(layer).folder
        per_chunk = chunk_rows(int(optimize.chunk), optimize.block_rows, lineage.width, getattr(torch, embed.dtype))
        num_chunks = math.ceil(rows / per_chunk)
        step = chunks_per_task(rows, row_bytes, per_chunk, memory, is_remote(ref.folder))
        chosen = read_plan(store, ref.folder) or {"rows": rows, "chunk_rows": per_chunk, "chunks_per_task": step}
        step = chosen["chunks_per_task"]
        asked = task_memory(min(rows, step * per_chunk), row_bytes, memory)
        reduces = reduce_tasks(ref.folder, source, rows, per_chunk, step, memory, asked)
        facts = {
            "layer": layer,
            "rows": rows,
            "d": lineage.d,
            "width": lineage.width,
            "chunk_rows": per_chunk,
            "activations": lineage.activations(layer).folder,
            "source": source,
        }
        tasks += remaining(store, [*reduces, finish_task("optimize", [ref], reduces, facts)])
        artifacts[f"layer-{layer}"] = artifact(store, ref, rows, rows * row_bytes, chosen)
        passes = shuffle_passes(experiment, lineage, store, layer)
        effort = optimize_effort(passes, row_bytes, per_chunk, step, memory)
        figures[f"layer-{layer}"] = {
            "rows": rows,
            "chunks": num_chunks,
            "chunk_bytes": per_chunk * row_bytes,
            "reduces": len(reduces),
            "memory_per_task": memory,
            **effort_figures(effort, experiment, ref.folder, measured_speed(store, ref.folder, source)),
            **measured_facts(store, ref.folder),
        }
    return Plan("optimize", tasks, artifacts, figures)


def reduce_tasks(
    folder: str, source: str, rows: int, chunk_rows: int, chunks_per_task: int, memory: int, asked: int = 0
) -> list[Task]:
    """Tasks that fill `chunks_per_task` chunks each, within `memory`; of a cluster they ask for `asked` bytes."""
    num_chunks = math.ceil(rows / chunk_rows)
    step = chunks_per_task
    return [
        Task(
            f"reduce-{i:05d}",
            "optimize",
            (folder,),
            resources=Resources(memory=asked),
            cost=float(min(step * chunk_rows, rows - i * step * chunk_rows)),
            args={
                "source": source,
                "first": i * step,
                "last": min((i + 1) * step, num_chunks),
                "chunk_rows": chunk_rows,
                "rows": rows,
                "memory": memory,
            },
        )
        for i in range(math.ceil(num_chunks / step))
    ]


def work(task: Task, context: Context) -> Mapping[str, Result]:
    return _finish(task, context) if task.id == FINISH else _reduce(task, context)


def _reduce(task: Task, context: Context) -> Mapping[str, Result]:
    from plmsae_cli.runtime.peak import peak_memory, reset_peak
    from plmsae_cli.store.blocks import stream_chunk
    from plmsae_cli.store.buckets import Buckets, Windows
    from plmsae_cli.store.rowsum import hexed

    begun = time.monotonic()
    reset_peak()
    source = task.args["source"]
    passes = as_passes(require_manifest(context.store, source))
    buckets = Buckets(context.store, source, passes.levels()[-1])
    row_bytes = buckets.d * buckets.dtype.itemsize
    first, last, per_chunk = task.args["first"], task.args["last"], task.args["chunk_rows"]
    start, stop = first * per_chunk, min(last * per_chunk, task.args["rows"])
    memory, num_files = task.args["memory"], passes.levels()[-1].groups
    held = held_rows(memory, row_bytes) if is_remote(source) else window_rows(memory, row_bytes, num_files)
    windows = Windows(buckets, stop, held)
    (folder,) = task.folders
    files = []
    for chunk in range(first, last):
        context.check_stop()
        low, high = chunk * per_chunk, min((chunk + 1) * per_chunk, stop)
        pieces = windows.pieces(low, high)
        files.append(stream_chunk(context.store, join(folder, chunk_name(chunk)), pieces, (high - low) * row_bytes))
        context.progress(chunk + 1 - first, last - first)
    windows.close()
    facts = {"rows": stop - start, "row_sum": hexed(windows.sum), "bytes": (stop - start) * row_bytes}
    return {folder: Result(files, {**facts, "seconds": time.monotonic() - begun, "peak_memory": peak_memory()})}


def _copied(store: Store, source: str, folder: str, wanted: FileRecord) -> FileRecord:
    """A file of the activations as a file of the dataset.

    Raises:
        StoreError: it is not there, or not what was recorded of it, which a copy with a hash of its own would hide for good.
    """
    from plmsae_cli.store.buckets import redo

    path, size = join(source, wanted.name), wanted.size
    pieces = (store.read(path, start, min(_COPIED, size - start)) for start in range(0, size, _COPIED))
    try:
        record = store.write(join(folder, wanted.name), pieces, size=size)
    except (MissingError, DamagedError) as error:
        raise type(error)(error.message, redo(source)) from error
    if record.xxh3 != wanted.xxh3:
        store.delete(record.name)
        raise DamagedError(
            f"{path} is damaged: its xxh3 is {record.xxh3}, its manifest says {wanted.xxh3}", redo(source)
        )
    return record


def _finish(task: Task, context: Context) -> Mapping[str, Result]:
    import torch

    from plmsae_cli.store.blocks import index_json
    from plmsae_cli.store.manifest import file_records
    from plmsae_cli.store.quantise import CALIBRATION

    store = context.store
    (folder,) = task.folders
    source = task.args["activations"]
    activations = require_manifest(store, source)
    parts = [part for part in made_parts(task, store, folder).values() if part.task.startswith("reduce-")]
    before = require_manifest(store, task.args["source"]).get("row_sum")
    facts = require_same_rows(store, task.args["source"], before, parts)
    beside = ("proteins.parquet", "stats.safetensors", CALIBRATION)
    files = [f for f in file_records(source, activations) if f.name in beside or f.name.startswith("heldout/")]
    copies = [_copied(store, source, folder, file) for file in files]
    rows, per_chunk = task.args["rows"], task.args["chunk_rows"]
    chunks = [(chunk_name(i), min(per_chunk, rows - i * per_chunk)) for i in range(math.ceil(rows / per_chunk))]
    quantised = activations["dtype"] == "int8"
    index = index_json(chunks, task.args["width"], getattr(torch, activations["dtype"]), quantised)
    records = [*copies, store.write(join(folder, "index.json"), [index])]
    keep = ("layer", "num_layers", "weights", "fasta", "dtype", "heldout_rows", "counts")
    facts |= {"rows": rows, "d": task.args["d"], "chunk_rows": per_chunk, **{k: activations[k] for k in keep}}
    facts |= {k: activations[k] for k in ("imported", "convention", "final_layer_norm") if k in activations}
    shuffled = {"seed": context.experiment.shuffle.seed} if context.experiment.shuffle else {}
    return {folder: Result(records, manifest_facts(task, folder, {**facts, **shuffled}).facts)}
