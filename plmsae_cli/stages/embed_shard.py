"""One shard of `embed`: the model over its proteins, its rows into the files of every layer."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from plmsae_cli.runtime.task import Context, Pending, Result, Task
from plmsae_cli.stages.common import as_passes
from plmsae_cli.store.fs import join
from plmsae_cli.store.lineage import Lineage

_WRITERS = ThreadPoolExecutor(4, thread_name_prefix="shards")
"""Write shards while the next one computes; each folder's files are one job."""
_SETTLING = ThreadPoolExecutor(1, thread_name_prefix="settling")
"""Waits for a shard's last rows; apart from the writers, who wait for it."""


def write_shard(task: Task, context: Context) -> Mapping[str, Result]:
    """Results are pending while files are written. Of a layer's two folders, activations and what is sorted from them, each may
    be there already."""
    from plmsae_cli.runtime.embedding import Embedder, Typical
    from plmsae_cli.runtime.peak import peak_memory
    from plmsae_cli.store.proteins import read_proteins
    from plmsae_cli.store.rowsum import hexed
    from plmsae_cli.store.shard_writer import Rows, ShardFiles, ShardRows, ShardWriter, coding_of
    from plmsae_cli.store.sorted_shard import SortedWriter

    experiment, store = context.experiment, context.store
    embed = experiment.embed
    assert embed is not None
    lineage = Lineage(experiment, store)
    index: int = task.args["index"]
    pairs: dict[str, str] = task.args["pairs"]
    source_of = {folder: pairs.get(folder, folder) for folder in task.folders}
    layer_of: dict[str, int] = {folder: task.args["layers"][source] for folder, source in source_of.items()}
    table = read_proteins(
        store,
        join(source_of[task.folders[0]], "proteins.parquet"),
        row_group=index,
        columns=["rows", "row_offset", "split", "sequence"],
    )
    embedder = Embedder.shared(experiment.model.weights, store, embed.compute)
    heldout = [split == "heldout" for split in table["split"].to_pylist()]
    offsets, counts = table["row_offset"].to_pylist(), table["rows"].to_pylist()
    train_rows = sum(count for count, held in zip(counts, heldout, strict=True) if not held)
    sides = (
        Rows(task.args["row_offset"], train_rows),
        Rows(task.args["heldout_offset"], sum(counts) - train_rows),
    )
    # int8 is made from numbers as they were computed.
    handed: torch.dtype = embedder.dtype if embed.dtype == "int8" else getattr(torch, embed.dtype)
    readers: dict[int, list[str]] = {}
    for folder, layer in layer_of.items():
        readers.setdefault(layer, []).append(folder)
    rows_of = {
        layer: ShardRows(coding_of(store, source_of[own[0]], embed.dtype, lineage.d), *sides, len(own))
        for layer, own in readers.items()
    }

    def writer_of(folder: str) -> ShardFiles:
        layer = layer_of[folder]
        if folder in pairs:
            shape = task.args["shape"]
            return SortedWriter(store, folder, as_passes(shape), index, shape["seed"], rows_of[layer])
        metadata = {
            "weights": lineage.weights.name,
            "weights_sha256": lineage.weights.sha256,
            "layer": str(layer),
            "convention": lineage.weights.convention,
            "final_layer_norm": json.dumps(lineage.weights.final_layer_norm(layer)),
            "tokens": "residues only",
            "dtype": embed.dtype,
            "compute": embedder.compute,
            "attention": embedder.attention,
        }
        return ShardWriter(
            store,
            folder,
            f"shard-{index:05d}.safetensors",
            lineage.d,
            rows_of[layer],
            metadata,
            list(zip(heldout, offsets, counts, strict=True)) if embed.pooled else None,
            embedder.device,
            task.args["kept"].get(folder),
        )

    def put(layer: int, protein: int, first: int, rows_RD: torch.Tensor) -> None:
        rows_of[layer].put(heldout[protein], offsets[protein] + first, rows_RD)

    stream = embedder.stream(
        table["sequence"].to_pylist(),
        sorted(rows_of),
        handed,
        embed.batch_tokens,
        put,
        context.progress,
        context.check_stop,
        window=embed.window,
        compile=embed.compile,
        typical=Typical(**task.args["typical"]),
    )
    # What computed the rows is known only now: passes may have gone on without what does not compile here.
    writers = {folder: writer_of(folder) for folder in task.folders}
    settled = _SETTLING.submit(stream.wait)

    def write(folder: str) -> Result:
        figures = settled.result().to_json()
        begun = time.monotonic()
        files = writers[folder].finish()
        seconds = round(time.monotonic() - begun, 4)
        facts = {"rows": sides[False].count, "row_sum": hexed(writers[folder].row_sum)}
        if folder in pairs:
            size = sum(file.size for file in files)
            return Result(files, {**facts, "bytes": size, "seconds": seconds, "peak_memory": peak_memory()})
        facts |= {
            "heldout_rows": sides[True].count,
            "compute": embedder.compute,
            "attention": embedder.attention,
            "kernels": stream.kernels,
            "batch_tokens": stream.budget,
            "figures": {**figures, "write_seconds": seconds},
        }
        return Result(files, facts)

    return Pending({folder: _WRITERS.submit(write, folder) for folder in task.folders})
