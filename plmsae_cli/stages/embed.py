"""FASTA to activations: one artifact a layer, every wanted layer in one pass of the model.

Tasks: `proteins` writes the table of proteins, `shard-*` run the model over near-equal shares of it, `finish` merges the
statistics. A shard's training rows are contiguous in the training numbering, its held-out rows in theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.runtime.task import Context, Plan, Resources, Result, Task
from plmsae_cli.stages.common import FINISH, artifact, finish_task, manifest_facts, read_plan, remaining
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.lineage import Lineage, Ref

CALIBRATION_ROWS = 1_000_000
"""Rows that int8's means and deviations are taken from."""
_CALIBRATION_PASS = 65_536
"""Of these, in memory at a time."""


def plan(experiment: Experiment, store: Store, layers: Sequence[int] | None = None) -> Plan:
    """Tasks that embed `layers` (default: all of the section's)."""
    embed = experiment.embed
    assert embed is not None
    lineage = Lineage(experiment, store)
    refs = {layer: lineage.embed(layer) for layer in (embed.layers if layers is None else layers)}
    scan, d = lineage.scan, lineage.d
    row_bytes = lineage.row_bytes
    ranges = _shard_ranges(store, refs, lambda: scan.shard_ranges(max(1, int(embed.shard) // row_bytes)))

    quantised = embed.dtype == "int8"
    offsets = scan.rows_before([start for start, _ in ranges])
    folders = tuple(ref.folder for ref in refs.values())
    proteins = Task("proteins", "embed", folders, cost=scan.num_proteins / 1e4, args={"ranges": ranges})
    calibrate = Task(
        "calibrate",
        "embed",
        folders,
        resources=Resources(gpus=1),
        cost=float(min(scan.num_rows, CALIBRATION_ROWS)),
        args={"layers": {ref.folder: layer for layer, ref in refs.items()}},
    )
    first = [proteins, calibrate] if quantised else [proteins]
    shards = [
        Task(
            f"shard-{i:05d}",
            "embed",
            folders,
            needs=tuple(task.id for task in first),
            resources=Resources(gpus=1, memory=2 * len(refs) * int(embed.shard)),
            cost=float(scan.lengths_P[start:stop].sum()),
            args={
                "index": i,
                "layers": {ref.folder: layer for layer, ref in refs.items()},
                "row_offset": offsets[i][0],
                "heldout_offset": offsets[i][1],
            },
        )
        for i, (start, stop) in enumerate(ranges)
    ]
    facts = {
        "rows": scan.num_rows,
        "heldout_rows": scan.num_heldout_rows,
        "d": d,
        "counts": dict(scan.counts),
        "layers": {ref.folder: layer for layer, ref in refs.items()},
    }
    tasks = [*first, *shards, finish_task("embed", list(refs.values()), [*first, *shards], facts)]
    rows = scan.num_rows + scan.num_heldout_rows
    return Plan(
        "embed",
        remaining(store, tasks),
        {
            f"layer-{layer}": artifact(store, ref, scan.num_rows, rows * row_bytes, {"ranges": ranges})
            for layer, ref in refs.items()
        },
        {
            "weights": f"{lineage.weights.name} (sha256 {lineage.weights.sha256[:12]}, {lineage.num_layers} layers, d {d})",
            "proteins": scan.num_proteins,
            "heldout_proteins": int(scan.heldout_P.sum()),
            "rows": scan.num_rows,
            "heldout_rows": scan.num_heldout_rows,
            "bytes_per_layer": rows * row_bytes,
            "layers": list(refs),
            "shards": len(ranges),
            **{k: v for k, v in scan.counts.items() if v and k not in ("proteins", "kept", "residues")},
        },
    )


def _shard_ranges(store: Store, refs: Mapping[int, Ref], fresh: Any) -> list[list[int]]:
    """The first start's ranges, where any layer was started; all layers of one pass share them."""
    started = {layer: p["ranges"] for layer, ref in refs.items() if (p := read_plan(store, ref.folder)) is not None}
    if not started:
        return [list(r) for r in fresh()]
    first, *others = started.items()
    for layer, ranges in others:
        if ranges != first[1]:
            raise UserError(
                f"layers {first[0]} and {layer} were begun with different shard sizes and cannot share a pass",
                "embed them with two experiments, each with its own layers",
            )
    return [list(r) for r in first[1]]


def work(task: Task, context: Context) -> Mapping[str, Result]:
    if task.id == "proteins":
        return _proteins(task, context)
    if task.id == "calibrate":
        return _calibrate(task, context)
    if task.id == FINISH:
        return _finish(task, context)
    return _shard(task, context)


def _proteins(task: Task, context: Context) -> Mapping[str, Result]:
    from plmsae_cli.store.proteins import write_proteins

    lineage = Lineage(context.experiment, context.store)
    embed = context.experiment.embed
    assert embed is not None
    ranges = [(start, stop) for start, stop in task.args["ranges"]]
    return {
        folder: Result(
            [
                write_proteins(
                    context.store, join(folder, "proteins.parquet"), lineage.fasta, lineage.scan, embed, ranges
                )
            ]
        )
        for folder in task.folders
    }


def _calibrate(task: Task, context: Context) -> Mapping[str, Result]:
    """Freeze what int8 rows are standardised by, on the training proteins with the smallest keyed hashes."""
    from plmsae_cli.runtime.embedding import Embedder
    from plmsae_cli.store.activations import Statistics
    from plmsae_cli.store.quantise import CALIBRATION, Quantiser
    from plmsae_cli.store.scan import sampled_proteins

    experiment, store = context.experiment, context.store
    embed = experiment.embed
    assert embed is not None
    lineage = Lineage(experiment, store)
    layer_of: dict[str, int] = {f: task.args["layers"][f] for f in task.folders}
    embedder = Embedder.shared(experiment.model.weights, store, embed.compute)
    statistics = {folder: Statistics(lineage.d) for folder in layer_of}
    layers = sorted(set(layer_of.values()))
    done = 0
    for sequences in sampled_proteins(lineage.fasta, lineage.scan, embed, CALIBRATION_ROWS, _CALIBRATION_PASS):

        def seen(step: float, _: float, *, _before: int = done, **figures: Any) -> None:
            context.progress(_before + step, min(CALIBRATION_ROWS, lineage.scan.num_rows), **figures)

        embedded = embedder.run(
            sequences,
            layers,
            [False] * len(sequences),
            embedder.compute,
            embed.batch_tokens,
            seen,
            context.check_stop,
        )
        for folder, layer in layer_of.items():
            statistics[folder].update(embedded[layer][0])
        done += sum(map(len, sequences))
    return {
        folder: Result(
            [Quantiser(s.mean_D, s.variance_D.sqrt(), s.count).write(store, join(folder, CALIBRATION))],
            {"rows": s.count},
        )
        for folder, s in statistics.items()
    }


def _shard(task: Task, context: Context) -> Mapping[str, Result]:
    import torch

    from plmsae_cli.runtime.embedding import Embedder
    from plmsae_cli.store.activations import Statistics
    from plmsae_cli.store.buckets import bytes_of
    from plmsae_cli.store.proteins import read_proteins
    from plmsae_cli.store.quantise import as_stored
    from plmsae_cli.store.rowsum import hexed, row_sum
    from plmsae_cli.store.tensorfile import write_tensors

    experiment, store = context.experiment, context.store
    embed = experiment.embed
    assert embed is not None
    lineage = Lineage(experiment, store)
    index: int = task.args["index"]
    layer_of: dict[str, int] = {f: task.args["layers"][f] for f in task.folders}
    table = read_proteins(store, join(task.folders[0], "proteins.parquet"), row_group=index)
    embedder = Embedder.shared(experiment.model.weights, store, embed.compute)
    sequences: list[str] = table["sequence"].to_pylist()
    heldout = [split == "heldout" for split in table["split"].to_pylist()]
    embedded = embedder.run(
        sequences,
        sorted(set(layer_of.values())),
        heldout,
        embedder.compute if embed.dtype == "int8" else embed.dtype,
        embed.batch_tokens,
        context.progress,
        context.check_stop,
    )
    results = {}
    for folder, layer in layer_of.items():
        stored = as_stored(embedded.pop(layer) if len(layer_of) == 1 else embedded[layer], store, folder, embed.dtype)
        train_RD, heldout_RD = stored.train_RW, stored.heldout_RW
        metadata = {
            "weights": lineage.weights.name,
            "weights_sha256": lineage.weights.sha256,
            "layer": str(layer),
            "convention": "residual stream after block k; 0 scaled embedding; last after final LayerNorm",
            "final_layer_norm": str(layer == lineage.num_layers).lower(),
            "tokens": "residues only",
            "dtype": embed.dtype,
            "compute": embedder.compute,
            "attention": embedder.attention,
        }
        statistics = Statistics(lineage.d)
        for part_RW in torch.split(train_RD, 65_536):
            statistics.update(stored.decode(part_RW))
        name = f"shard-{index:05d}.safetensors"
        results[folder] = Result(
            [
                write_tensors(
                    store,
                    join(folder, name),
                    {"acts": train_RD},
                    {**metadata, "row_offset": str(task.args["row_offset"])},
                ),
                write_tensors(
                    store,
                    join(folder, "heldout", name),
                    {"acts": heldout_RD},
                    {**metadata, "row_offset": str(task.args["heldout_offset"])},
                ),
                write_tensors(store, join(folder, "statistics", name), statistics.to_tensors(), {}),
            ],
            {
                "rows": train_RD.shape[0],
                "heldout_rows": heldout_RD.shape[0],
                "row_sum": hexed(row_sum(bytes_of(train_RD))),
            },
        )
    return results


def _finish(task: Task, context: Context) -> Mapping[str, Result]:
    from plmsae_cli.store.activations import Statistics
    from plmsae_cli.store.manifest import read_parts
    from plmsae_cli.store.rowsum import joined
    from plmsae_cli.store.tensorfile import TensorFile

    lineage = Lineage(context.experiment, context.store)
    results = {}
    for folder in task.folders:
        parts = read_parts(context.store, folder)
        merged = Statistics(lineage.d)
        for name in sorted(parts):
            if name.startswith("shard-"):
                file = TensorFile(context.store, join(folder, "statistics", f"{name}.safetensors"))
                merged.merge(Statistics.from_tensors({k: file.read(k) for k in file.names()}))
        record = merged.write(context.store, join(folder, "stats.safetensors"))
        facts = {
            "rows": task.args["rows"],
            "heldout_rows": task.args["heldout_rows"],
            "d": task.args["d"],
            "counts": task.args["counts"],
            "dtype": context.experiment.embed.dtype if context.experiment.embed else None,
            "layer": task.args["layers"][folder],
            "num_layers": lineage.num_layers,
            "weights": {"name": lineage.weights.name, "sha256": lineage.weights.sha256},
            "fasta": {"sha256": lineage.scan.sha256, "name": lineage.fasta.name},
        }
        shards = [part.facts for name, part in parts.items() if name.startswith("shard-")]
        if all("row_sum" in found for found in shards):  # those of an earlier version have none
            facts["row_sum"] = joined(found["row_sum"] for found in shards)
        results[folder] = Result([record], manifest_facts(task, folder, facts).facts)
    return results
