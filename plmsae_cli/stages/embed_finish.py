"""The end of `embed`, computed or imported: calibrations, statistics of all shards, the manifests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from plmsae_cli.runtime.task import Context, Result, Task
from plmsae_cli.stages.common import made_parts, manifest_facts, require_same_rows
from plmsae_cli.store.fs import FileRecord, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import Part

if TYPE_CHECKING:
    from plmsae_cli.store.activations import Statistics


def calibration(context: Context, folder: str, statistics: Statistics) -> Result:
    """Freeze what int8 rows of an artifact are standardised by."""
    from plmsae_cli.store.quantise import CALIBRATION, Quantiser

    quantiser = Quantiser(statistics.mean_D, statistics.variance_D.sqrt(), statistics.count)
    return Result([quantiser.write(context.store, join(folder, CALIBRATION))], {"rows": statistics.count})


def merge_shards(
    task: Task, context: Context, lineage: Lineage, folder: str, layer: int
) -> tuple[FileRecord, list[Part], dict[str, Any]]:
    """Of an artifact whose shards are there: its statistics, as written; their records; facts that every origin has."""
    from plmsae_cli.store.activations import Statistics

    embed = context.experiment.embed
    assert embed is not None
    parts = made_parts(task, context.store, folder)
    names = sorted(name for name in parts if name.startswith("shard-"))
    merged = Statistics.of_shards(context.store, folder, lineage.d, names)
    record = merged.write(context.store, join(folder, "stats.safetensors"))
    facts = {name: task.args[name] for name in ("rows", "heldout_rows", "d", "counts")}
    facts |= {"dtype": embed.dtype, "layer": layer, "num_layers": lineage.num_layers}
    return record, [parts[name] for name in names], facts


def finish_embedding(task: Task, context: Context) -> Mapping[str, Result]:
    from plmsae_cli.runtime.embedding import summary
    from plmsae_cli.store.rowsum import joined

    lineage = Lineage(context.experiment, context.store)
    results = {}
    speed: Mapping[str, float] = {}
    kernel: Mapping[str, list[Any]] = {}
    for folder in task.folders:
        if folder in task.args["pairs"]:
            results[folder] = _finish_sorted(task, context, folder)
            continue
        layer: int = task.args["layers"][folder]
        record, parts, facts = merge_shards(task, context, lineage, folder, layer)
        shards = [part.facts for part in parts]
        speed = summary(facts["figures"] for facts in shards if "figures" in facts)
        kernel = _kernels(shards)
        facts |= {
            "weights": {"name": lineage.weights.name, "sha256": lineage.weights.sha256},
            "fasta": {"sha256": lineage.scan.sha256, "name": lineage.fasta.name},
            "convention": lineage.weights.convention,
            "final_layer_norm": lineage.weights.final_layer_norm(layer),
            "kernel": kernel,
            "speed": speed,
        }
        if folder in task.args["kept"]:
            ordered = min(task.args["kept"][folder], task.args["rows"])
            sorted_in = next(to for to, source in task.args["pairs"].items() if source == folder)
            facts |= {"layout": "bucketed", "ordered_rows": ordered, "sorted_in": sorted_in.rpartition("/")[2]}
        if all("row_sum" in found for found in shards):  # those of an earlier version have none
            facts["row_sum"] = joined(found["row_sum"] for found in shards)
        results[folder] = Result([record], manifest_facts(task, folder, facts).facts)
    if speed:
        context.progress(1, 1, note=_told(speed, kernel))
    return results


def _finish_sorted(task: Task, context: Context, folder: str) -> Result:
    """The manifest of map files, as `shuffle` would write it."""

    parts = [part for name, part in made_parts(task, context.store, folder).items() if name.startswith("shard-")]
    source = task.args["pairs"][folder]
    facts = {
        **{name: value for name, value in task.args["shape"].items() if name != "seed"},
        "d": task.args["d"],
        "layer": task.args["layers"][source],
        "layout": "bucketed",
        **require_same_rows(context.store, source, None, parts),
    }
    return manifest_facts(task, folder, facts)


def _kernels(shards: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What computed the shards: one value of each unless machines differed or memory ran out."""
    names = ("compute", "attention", "kernels", "batch_tokens")
    return {name: sorted({facts[name] for facts in shards if name in facts}) for name in names}


def _told(speed: Mapping[str, float], kernel: Mapping[str, list[Any]]) -> str:
    compute, attention, kernels = (" and ".join(kernel[name]) for name in ("compute", "attention", "kernels"))
    return (
        f"embed: {speed['residues_per_second']:,.0f} residues/s a process, device busy {speed['busy']:.1%}, waited for rows "
        f"to leave {speed['waited']:.1%}, files being written {speed['writing']:.0%}, padding {speed['padding']:.2%}; "
        f"{compute}, attention {attention}, {kernels}"
    )
