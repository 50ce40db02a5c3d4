"""FASTA to activations: one artifact a layer, every wanted layer in one pass of the model.

Tasks: `proteins` writes the table of proteins, `shard-*` run the model over near-equal shares of it, `finish` merges the
statistics. A shard's training rows are contiguous in the training numbering, its held-out rows in theirs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.plm.esm2 import ESM2Config
from plmsae_cli.runtime.embedding import forecast
from plmsae_cli.runtime.task import Context, Pending, Plan, Resources, Result, Task
from plmsae_cli.stages import imported
from plmsae_cli.stages.common import FINISH, artifact, finish_task, manifest_facts, remaining, shared_ranges
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.lineage import Lineage

CALIBRATION_ROWS = 1_000_000
"""Rows that int8's means and deviations are taken from."""
_CALIBRATION_PASS = 65_536
"""Of these, in memory at a time."""
_WRITERS = ThreadPoolExecutor(4, thread_name_prefix="shards")
"""Write shards while the next one computes; each layer's files are one job."""
_SETTLING = ThreadPoolExecutor(1, thread_name_prefix="settling")
"""Waits for a shard's last rows; apart from the writers, who wait for it."""


def plan(experiment: Experiment, store: Store, layers: Sequence[int] | None = None) -> Plan:
    """Tasks that embed `layers` (default: all of the section's)."""
    embed = experiment.embed
    assert embed is not None
    lineage = Lineage(experiment, store)
    refs = {layer: lineage.embed(layer) for layer in (embed.layers if layers is None else layers)}
    if embed.imported is not None:
        return imported.plan(lineage, refs)
    scan, d = lineage.scan, lineage.d
    row_bytes = lineage.row_bytes
    ranges = shared_ranges(store, refs, lambda: scan.shard_ranges(max(1, int(embed.shard) // row_bytes)))

    quantised = embed.dtype == "int8"
    typical = forecast.typical(scan.lengths_P, scan.max_length, ranges)._asdict()
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
            # One shard is computed while the one before is written.
            resources=Resources(gpus=1, memory=5 * len(refs) * int(embed.shard) // 2),
            cost=float(scan.lengths_P[start:stop].sum()),
            args={
                "index": i,
                "layers": {ref.folder: layer for layer, ref in refs.items()},
                "row_offset": offsets[i][0],
                "heldout_offset": offsets[i][1],
                "typical": typical,
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
    # A shard: rows of both sides, statistics, its record, perhaps means; once: proteins and statistics, two records, plan,
    # manifest.
    objects = len(refs) * ((4 + embed.pooled) * len(ranges) + 6)
    left = remaining(store, tasks)
    hours = _hours(experiment, lineage, max(refs, default=0)) if left else {}
    return Plan(
        "embed",
        left,
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
            "bytes": len(refs) * (rows * row_bytes + embed.pooled * scan.num_proteins * d * 4),
            "objects": objects,
            **hours,
            "shards": len(ranges),
            **{k: v for k, v in scan.counts.items() if v and k not in ("proteins", "kept", "residues")},
        },
    )


def _hours(experiment: Experiment, lineage: Lineage, depth: int) -> dict[str, Any]:
    embed, scan = experiment.embed, lineage.scan
    assert embed is not None
    if lineage.weights.format == "encoder":
        return {"hours_from": "not predicted for hf: encoders"}
    config = ESM2Config(**lineage.weights.config)
    return forecast.forecast(config, depth, scan.lengths_P, scan.max_length, experiment.launch, embed.compute)


def work(task: Task, context: Context) -> Mapping[str, Result]:
    if "imported" in task.args:
        return imported.work(task, context)
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
    from plmsae_cli.runtime.embedding import Embedder, Typical
    from plmsae_cli.store.proteins import read_proteins
    from plmsae_cli.store.rowsum import hexed
    from plmsae_cli.store.shard_writer import Rows, ShardWriter, coding_of

    experiment, store = context.experiment, context.store
    embed = experiment.embed
    assert embed is not None
    lineage = Lineage(experiment, store)
    index: int = task.args["index"]
    layer_of: dict[str, int] = {f: task.args["layers"][f] for f in task.folders}
    table = read_proteins(
        store,
        join(task.folders[0], "proteins.parquet"),
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
    writers = {
        folder: ShardWriter(
            store,
            folder,
            f"shard-{index:05d}.safetensors",
            lineage.d,
            coding_of(store, folder, embed.dtype, lineage.d),
            *sides,
            {
                "weights": lineage.weights.name,
                "weights_sha256": lineage.weights.sha256,
                "layer": str(layer),
                "convention": "residual stream after block k; 0 scaled embedding; last after final LayerNorm",
                "final_layer_norm": str(layer == lineage.num_layers).lower(),
                "tokens": "residues only",
                "dtype": embed.dtype,
                "compute": embedder.compute,
                "attention": embedder.attention,
            },
            list(zip(heldout, offsets, counts, strict=True)) if embed.pooled else None,
            embedder.device,
        )
        for folder, layer in layer_of.items()
    }
    wanting: dict[int, list[ShardWriter]] = {}
    for folder, layer in layer_of.items():
        wanting.setdefault(layer, []).append(writers[folder])

    def put(layer: int, protein: int, first: int, rows_RD: torch.Tensor) -> None:
        for writer in wanting[layer]:
            writer.put(heldout[protein], offsets[protein] + first, rows_RD)

    stream = embedder.stream(
        table["sequence"].to_pylist(),
        sorted(wanting),
        handed,
        embed.batch_tokens,
        put,
        context.progress,
        context.check_stop,
        window=embed.max_length if embed.long == "windows" else None,
        compile=embed.compile,
        typical=Typical(**task.args["typical"]),
    )
    settled = _SETTLING.submit(stream.wait)

    def write(folder: str) -> Result:
        figures = settled.result().to_json()
        begun = time.monotonic()
        files = writers[folder].finish()
        figures["write_seconds"] = round(time.monotonic() - begun, 4)
        facts = {
            "rows": sides[False].count,
            "heldout_rows": sides[True].count,
            "row_sum": hexed(writers[folder].row_sum),
            "compute": embedder.compute,
            "attention": embedder.attention,
            "compiled": stream.compiled,
            "batch_tokens": stream.budget,
            "figures": figures,
        }
        return Result(files, facts)

    return Pending({folder: _WRITERS.submit(write, folder) for folder in task.folders})


def _finish(task: Task, context: Context) -> Mapping[str, Result]:
    from plmsae_cli.runtime.embedding import summary
    from plmsae_cli.store.activations import Statistics
    from plmsae_cli.store.manifest import read_parts
    from plmsae_cli.store.rowsum import joined
    from plmsae_cli.store.shard_writer import BUFFERS

    lineage = Lineage(context.experiment, context.store)
    results = {}
    for folder in task.folders:
        parts = read_parts(context.store, folder)
        names = sorted(name for name in parts if name.startswith("shard-"))
        merged = Statistics.of_shards(context.store, folder, lineage.d, names)
        shards = [parts[name].facts for name in names]
        speed = summary(facts["figures"] for facts in shards if "figures" in facts)
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
            "kernel": _kernels(shards),
            "speed": speed,
        }
        if all("row_sum" in found for found in shards):  # those of an earlier version have none
            facts["row_sum"] = joined(found["row_sum"] for found in shards)
        results[folder] = Result([record], manifest_facts(task, folder, facts).facts)
    if speed:
        context.progress(1, 1, note=_told(speed))
    BUFFERS.clear()
    return results


def _kernels(shards: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What computed the shards: one value of each unless machines differed or memory ran out."""
    names = ("compute", "attention", "compiled", "batch_tokens")
    return {name: sorted({facts[name] for facts in shards if name in facts}) for name in names}


def _told(speed: Mapping[str, float]) -> str:
    return (
        f"embed: {speed['residues_per_second']:,.0f} residues/s a process, device busy {speed['busy']:.1%}, waited for rows "
        f"to leave {speed['waited']:.1%}, files being written {speed['writing']:.0%}, padding {speed['padding']:.2%}"
    )
