"""The stage embed where activations come from files of others: the same artifact, copied instead of computed.

The tasks are those of `embed`; a shard reads its rows from the source a few thousand at a time. D: dimensions of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.runtime.task import Context, Plan, Resources, Result, Task
from plmsae_cli.stages.common import (
    CALIBRATION_ROWS,
    FINISH,
    artifact,
    embedded_files,
    finish_task,
    manifest_facts,
    price_figures,
    remaining,
    shard_ranges,
)
from plmsae_cli.stages.embed_finish import calibration, merge_shards
from plmsae_cli.store.fs import join
from plmsae_cli.store.lineage import Lineage, Ref
from plmsae_cli.store.passes import puts

_PIECE_NUMBERS = 1 << 23
"""Numbers read from the source at a time."""
_CONVENTION = "as imported"
"""What layer k is: the other program's business."""


def plan(lineage: Lineage, refs: Mapping[int, Ref]) -> Plan:
    """Tasks that import the layers of `refs`."""
    embed, store, scan = lineage.experiment.embed, lineage.store, lineage.scan
    assert embed is not None
    rows, row_bytes = scan.num_rows + scan.num_heldout_rows, lineage.row_bytes
    ranges, _ = shard_ranges(store, lineage, {layer: [ref.folder] for layer, ref in refs.items()})
    layer_of = {ref.folder: layer for layer, ref in refs.items()}
    folders = tuple(layer_of)
    sources = {layer: lineage.source(layer) for layer in refs}
    common: dict[str, Any] = {"imported": layer_of}
    first = [Task("proteins", "embed", folders, cost=1.0, args={"ranges": ranges, **common})]
    if embed.dtype == "int8":
        first.append(Task("calibrate", "embed", folders, cost=float(min(rows, CALIBRATION_ROWS)), args=common))
    offsets = scan.rows_before([start for start, _ in ranges])
    shards = [
        Task(
            f"shard-{i:05d}",
            "embed",
            folders,
            needs=tuple(task.id for task in first),
            # The shard, and what is read for it at a time.
            resources=Resources(memory=3 * int(embed.shard) // 2),
            cost=float(scan.lengths_P[start:stop].sum()),
            args={"index": i, "range": [start, stop], "offsets": list(offsets[i]), **common},
        )
        for i, (start, stop) in enumerate(ranges)
    ]
    facts = {
        "rows": scan.num_rows,
        "heldout_rows": scan.num_heldout_rows,
        "d": lineage.d,
        "counts": dict(scan.counts),
        **common,
    }
    tasks = [*first, *shards, finish_task("embed", list(refs.values()), [*first, *shards], facts)]
    size = rows * row_bytes + embed.pooled * scan.num_proteins * lineage.d * 4
    objects, all_bytes = len(refs) * embedded_files(embed, len(ranges), len(ranges)), len(refs) * size
    return Plan(
        "embed",
        remaining(store, tasks),
        {
            f"layer-{layer}": artifact(store, ref, scan.num_rows, size, {"ranges": ranges})
            for layer, ref in refs.items()
        },
        {
            "imported": ", ".join(f"{s.path} ({s.format}, {len(s.parts):,} files)" for s in sources.values()),
            "weights": lineage.weights.name if lineage.has_model else "not known",
            "proteins": scan.num_proteins if embed.fasta is not None else "not known",
            "documents": scan.num_proteins,
            "heldout_documents": int(scan.heldout_P.sum()),
            "rows": scan.num_rows,
            "heldout_rows": scan.num_heldout_rows,
            "d": lineage.d,
            "bytes_per_layer": rows * row_bytes,
            "layers": list(refs),
            "bytes": all_bytes,
            "objects": objects,
            **price_figures(lineage.experiment, lineage.experiment.data_folder(), puts(objects, all_bytes), all_bytes),
            "shards": len(ranges),
        },
    )


def work(task: Task, context: Context) -> Mapping[str, Result]:
    lineage = Lineage(context.experiment, context.store)
    steps = {"proteins": _proteins, "calibrate": _calibrate, FINISH: _finish}
    results = {}
    for folder in task.folders:
        layer: int = task.args["imported"][folder]
        if lineage.embed(layer).folder != folder:
            raise UserError(
                f"embed.imported: {lineage.source(layer).path} changed since this work was planned",
                "start again: the new files are a new input",
            )
        results[folder] = steps.get(task.id, _shard)(task, context, lineage, layer, folder)
    return results


def _proteins(task: Task, context: Context, lineage: Lineage, layer: int, folder: str) -> Result:
    from plmsae_cli.store.imports import write_documents
    from plmsae_cli.store.proteins import write_proteins

    embed = context.experiment.embed
    assert embed is not None
    path = join(folder, "proteins.parquet")
    ranges = [(start, stop) for start, stop in task.args["ranges"]]
    if embed.fasta is not None:
        return Result([write_proteins(context.store, path, lineage.fasta, lineage.scan, embed, ranges)])
    return Result([write_documents(context.store, path, lineage.source(layer), lineage.scan, ranges)])


def _calibrate(task: Task, context: Context, lineage: Lineage, layer: int, folder: str) -> Result:
    """Freeze what int8 rows are standardised by, on the training documents with the smallest keyed hashes of their number."""
    import numpy as np
    import torch

    from plmsae_cli.store.activations import Statistics
    from plmsae_cli.store.permutation import counter_hash

    scan, source = lineage.scan, lineage.source(layer)
    lengths_P = scan.lengths_P.astype(np.int64)
    first_P = np.cumsum(lengths_P) - lengths_P
    order = np.argsort(counter_hash(1, np.arange(scan.num_proteins)), kind="stable")
    order = order[~scan.heldout_P[order]]
    before = np.cumsum(lengths_P[order]) - lengths_P[order]
    chosen = np.sort(order[before < CALIBRATION_ROWS])
    statistics = Statistics(source.d)
    for done, document in enumerate(chosen.tolist()):
        context.check_stop()
        start = int(first_P[document])
        for low, high in _pieces(start, start + int(lengths_P[document]), source.d):
            statistics.update(source.read(low, high, torch.float32))
        context.progress(done + 1, len(chosen))
    return calibration(context, folder, statistics)


def _shard(task: Task, context: Context, lineage: Lineage, layer: int, folder: str) -> Result:
    import numpy as np
    import torch

    from plmsae_cli.store.rowsum import hexed
    from plmsae_cli.store.shard_writer import Rows, ShardRows, ShardWriter, coding_of

    embed, scan, source = context.experiment.embed, lineage.scan, lineage.source(layer)
    assert embed is not None
    start, stop = task.args["range"]
    lengths_P, heldout_P = scan.lengths_P[start:stop], scan.heldout_P[start:stop]
    held_R = torch.from_numpy(np.repeat(heldout_P, lengths_P))
    begin = int(scan.lengths_P[:start].sum(dtype=np.int64))
    num_held = int(held_R.sum())
    sides = (
        Rows(task.args["offsets"][0], len(held_R) - num_held),
        Rows(task.args["offsets"][1], num_held),
    )
    pooled = None
    if embed.pooled:
        offsets_P = scan.row_offset_P[start:stop]
        pooled = list(zip(heldout_P.tolist(), offsets_P.tolist(), lengths_P.tolist(), strict=True))
    rows = ShardRows(coding_of(context.store, folder, embed.dtype, source.d), *sides)
    writer = ShardWriter(
        context.store,
        folder,
        f"shard-{task.args['index']:05d}.safetensors",
        source.d,
        rows,
        {"imported": source.format, "layer": str(layer), "convention": _CONVENTION, "dtype": embed.dtype},
        pooled,
    )
    stored = torch.float32 if embed.dtype == "int8" else getattr(torch, embed.dtype)
    places = [side.offset for side in sides]
    for low, high in _pieces(begin, begin + len(held_R), source.d):
        context.check_stop()
        rows_RD = source.read(low, high, stored)
        mask_R = held_R[low - begin : high - begin]
        for side, chosen_R in enumerate((~mask_R, mask_R)):
            own_RD = rows_RD[chosen_R]
            rows.put(bool(side), places[side], own_RD)
            places[side] += len(own_RD)
        context.progress(high - begin, len(held_R), unit="rows")
    files = writer.finish()
    facts = {"rows": sides[False].count, "heldout_rows": sides[True].count, "row_sum": hexed(writer.row_sum)}
    return Result(files, facts)


def _pieces(start: int, stop: int, d: int) -> Sequence[tuple[int, int]]:
    """[start, stop) in ranges of bounded size."""
    step = max(1, _PIECE_NUMBERS // d)
    return [(low, min(low + step, stop)) for low in range(start, stop, step)]


def _finish(task: Task, context: Context, lineage: Lineage, layer: int, folder: str) -> Result:
    from plmsae_cli.store.rowsum import joined

    embed = context.experiment.embed
    assert embed is not None
    record, parts, facts = merge_shards(task, context, lineage, folder, layer)
    weights = {"name": lineage.weights.name, "sha256": lineage.weights.sha256} if lineage.has_model else None
    fasta = {"sha256": lineage.scan.sha256, "name": Path(lineage.fasta).name} if embed.fasta is not None else None
    facts |= {
        "weights": weights,
        "fasta": fasta,
        "convention": _CONVENTION,
        "imported": {"format": (source := lineage.source(layer)).format, "path": str(source.path)},
        "row_sum": joined(part.facts["row_sum"] for part in parts),
    }
    return Result([record], manifest_facts(task, folder, facts).facts)
