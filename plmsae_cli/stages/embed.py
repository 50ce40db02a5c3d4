"""FASTA to activations: one artifact a layer, every wanted layer in one pass of the model.

Tasks: `proteins` writes the table of proteins, `shard-*` run the model over near-equal shares of it, `finish` merges the
statistics. A shard's training rows are contiguous in the training numbering, its held-out rows in theirs. With `layout:
bucketed` a shard's rows go, sorted, into the shuffle's folder, of the first alone a copy in order into the activations'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.runtime.device import count_gpus
from plmsae_cli.runtime.embedding import forecast
from plmsae_cli.runtime.models import model_config
from plmsae_cli.runtime.task import Context, Plan, Resources, Result, Task
from plmsae_cli.stages import imported
from plmsae_cli.stages.common import (
    CALIBRATION_ROWS,
    FINISH,
    artifact,
    embedded_files,
    finish_task,
    passes_json,
    price_figures,
    read_plan,
    remaining,
    require_layout,
    shape_of_shards,
    shard_ranges,
)
from plmsae_cli.stages.embed_finish import calibration, finish_embedding
from plmsae_cli.stages.embed_shard import write_shard
from plmsae_cli.store.fs import Store, is_remote, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.passes import PLACE_BYTES, ROW_OVERHEAD, Passes, puts
from plmsae_cli.store.sorted_shard import require_fit

_CALIBRATION_PASS = 65_536
"""Of these, in memory at a time."""


def plan(experiment: Experiment, store: Store, layers: Sequence[int] | None = None) -> Plan:
    """Tasks that embed `layers` (default: all of the section's)."""
    embed = experiment.embed
    assert embed is not None
    lineage = Lineage(experiment, store)
    chosen = list(embed.layers if layers is None else layers)
    refs = {layer: lineage.embed(layer) for layer in chosen}
    if embed.imported is not None:
        return imported.plan(lineage, refs)
    sorted_refs = {layer: lineage.shuffle(layer) for layer in chosen} if embed.layout == "bucketed" else {}
    for ref in sorted_refs.values():
        require_layout(store, ref.folder, "bucketed")
    scan, d = lineage.scan, lineage.d
    row_bytes = lineage.row_bytes
    written = {layer: [pair[layer].folder for pair in (refs, sorted_refs) if pair] for layer in chosen}
    ranges, begun = shard_ranges(store, lineage, written)
    passes = shape_of_shards(lineage, ranges) if sorted_refs else None

    typical = forecast.typical(scan.lengths_P, scan.max_length, ranges)._asdict()
    offsets = scan.rows_before([start for start, _ in ranges])
    folders = tuple(ref.folder for ref in refs.values())
    layer_of = {ref.folder: layer for layer, ref in refs.items()}
    proteins = Task("proteins", "embed", folders, cost=scan.num_proteins / 1e4, args={"ranges": ranges})
    calibrate = Task(
        "calibrate",
        "embed",
        folders,
        resources=Resources(gpus=1),
        cost=float(min(scan.num_rows, CALIBRATION_ROWS)),
        args={"layers": layer_of},
    )
    first = [proteins, calibrate] if embed.dtype == "int8" else [proteins]
    # Where embed sorts: each shuffle's folder beside that of the activations its rows are from.
    pairs = {ref.folder: refs[layer].folder for layer, ref in sorted_refs.items()}
    kept = {ref.folder: _kept(store, ref.folder, embed.ordered_rows) for ref in refs.values()} if passes else {}
    to_sort = 0 if passes is None else passes.map_rows * ROW_OVERHEAD
    shape = {} if passes is None else passes_json(passes) | {"seed": _seed(experiment)}
    shards = [
        Task(
            f"shard-{i:05d}",
            "embed",
            (*folders, *pairs),
            needs=tuple(task.id for task in first),
            # One shard is computed while the one before is written.
            resources=Resources(gpus=1, memory=5 * len(refs) * int(embed.shard) // 2 + len(refs) * to_sort),
            cost=float(scan.lengths_P[start:stop].sum()),
            args={
                "index": i,
                "layers": layer_of,
                "row_offset": offsets[i][0],
                "heldout_offset": offsets[i][1],
                "typical": typical,
                "pairs": pairs,
                "kept": kept,
                "shape": shape,
            },
        )
        for i, (start, stop) in enumerate(ranges)
    ]
    facts = {
        "rows": scan.num_rows,
        "heldout_rows": scan.num_heldout_rows,
        "d": d,
        "counts": dict(scan.counts),
        "layers": layer_of,
        "pairs": pairs,
        "kept": kept,
        "shape": shape,
    }
    # Activations before what is sorted from them: with the latter nobody asks for the former's task any more.
    finished = [*refs.values(), *sorted_refs.values()]
    tasks = [*first, *shards, finish_task("embed", finished, [*first, *shards], facts)]
    rows = scan.num_rows + scan.num_heldout_rows
    left = remaining(store, tasks)
    if passes is not None and left:
        remote = is_remote(experiment.data_folder())
        require_fit(experiment, scan, ranges, row_bytes, len(refs), remote, begun)
    hours = _hours(experiment, lineage, max(refs, default=0)) if left else {}
    artifacts = {}
    objects = size = 0
    means = embed.pooled * scan.num_proteins * d * 4
    for layer, ref in refs.items():
        ordered = scan.num_rows if passes is None else min(kept[ref.folder], scan.num_rows)
        own = (ordered + scan.num_heldout_rows) * row_bytes + means
        objects += embedded_files(embed, len(ranges), sum(o < ordered or passes is None for o, _ in offsets))
        body = {"ranges": ranges} | ({"ordered_rows": kept[ref.folder]} if passes else {})
        artifacts[f"layer-{layer}"] = artifact(store, ref, scan.num_rows, own, body)
        size += own
        if passes is not None:
            placed = scan.num_rows * (row_bytes + PLACE_BYTES)
            # A shard: its map file and record; once: a record, plan, manifest.
            objects += 2 * len(ranges) + 3
            body = {**passes_json(passes), "ranges": ranges}
            made = artifact(store, sorted_refs[layer], scan.num_rows, placed, body)
            artifacts[f"sorted-layer-{layer}"] = replace(made, of="shuffle")
            size += placed
    return Plan(
        "embed",
        left,
        artifacts,
        {
            "weights": f"{lineage.weights.name} (sha256 {lineage.weights.sha256[:12]}, {lineage.num_layers} layers, d {d})",
            "proteins": scan.num_proteins,
            "heldout_proteins": int(scan.heldout_P.sum()),
            "rows": scan.num_rows,
            "heldout_rows": scan.num_heldout_rows,
            "bytes_per_layer": rows * row_bytes,
            "layers": list(refs),
            **({} if passes is None else _sorting(passes, row_bytes, kept, len(refs))),
            "bytes": size,
            "objects": objects,
            **price_figures(experiment, experiment.data_folder(), puts(objects, size), size),
            **hours,
            "shards": len(ranges),
            **{k: v for k, v in scan.counts.items() if v and k not in ("proteins", "kept", "residues")},
        },
    )


def _seed(experiment: Experiment) -> int:
    assert experiment.shuffle is not None
    return experiment.shuffle.seed


def _kept(store: Store, folder: str, wanted: int) -> int:
    """Rows kept in protein order: as the first start chose."""
    begun = read_plan(store, folder)
    return wanted if begun is None else int(begun["ordered_rows"])


def _sorting(passes: Passes, row_bytes: int, kept: Mapping[str, int], layers: int) -> dict[str, Any]:
    """Figures of `layout: bucketed`."""
    return {
        "layout": "bucketed: rows are written sorted, of all passes over the data only optimize's is left (1 R + 1 W)",
        "maps": passes.maps,
        "ordered_rows": min(passes.rows, *kept.values()),
        "memory_to_sort": passes.map_rows * (row_bytes + ROW_OVERHEAD) * layers,
    }


def _hours(experiment: Experiment, lineage: Lineage, depth: int) -> dict[str, Any]:
    embed, scan = experiment.embed, lineage.scan
    assert embed is not None
    if lineage.weights.format == "encoder":
        return {"hours_from": "not predicted for hf: encoders"}
    config, price = model_config(lineage.weights), experiment.price.gpu_hour
    found = forecast.forecast(config, depth, scan.lengths_P, scan.max_length, experiment.launch, embed.compute)
    if price is not None and "hours" in found and (gpus := count_gpus(experiment.launch)):
        found["usd_gpus"] = round(found["hours"] * gpus * price, 2)
    return found


def work(task: Task, context: Context) -> Mapping[str, Result]:
    if "imported" in task.args:
        return imported.work(task, context)
    if task.id == "proteins":
        return _proteins(task, context)
    if task.id == "calibrate":
        return _calibrate(task, context)
    if task.id == FINISH:
        return finish_embedding(task, context)
    return write_shard(task, context)


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
    from plmsae_cli.store.kept_proteins import sampled_proteins

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
            window=embed.window,
        )
        for folder, layer in layer_of.items():
            statistics[folder].update(embedded[layer][0])
        done += sum(map(len, sequences))
    return {folder: calibration(context, folder, found) for folder, found in statistics.items()}
