"""Evidence about a trained dictionary: one task an axis, results in Parquet and JSON beside the run.

`eval/latents.parquet` has one row a latent; `eval/metrics.json` the figures of the run; `report/index.html` shows both.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from plmsae_cli.config.base import digest
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment, Fidelity
from plmsae_cli.runtime.task import Artifact, Context, Plan, Resources, Result, Task
from plmsae_cli.stages.common import remaining, require_manifest
from plmsae_cli.store.fs import FileRecord, Store, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import canonical_json, read_manifest, read_parts

if TYPE_CHECKING:
    from plmsae_cli.store.weights import WeightsInfo

CONTEXT_RESIDUES = 10
"""Residues shown on either side of a latent's strongest one."""


def plan(experiment: Experiment, store: Store) -> Plan:
    evaluation = experiment.eval
    assert evaluation is not None
    lineage = Lineage(experiment, store)
    manifest = read_manifest(store, lineage.dataset().folder)
    _require_heldout(lineage, manifest)
    if manifest is not None and evaluation.fidelity.loss_recovered:
        _require_same_model(lineage.weights, manifest["weights"])
    folder = lineage.run_folder()
    identity = digest({"run": lineage.run_identity(), "fidelity": evaluation.fidelity.science()})
    tasks = remaining(store, [Task(f"fidelity-{identity[:8]}", "eval", (folder,), resources=Resources(gpus=1))])
    options = evaluation.fidelity
    figures = {
        "axes": ["fidelity"],
        "loss_recovered": options.loss_recovered,
        "proteins": options.proteins if options.proteins is not None else "all held out",
        "mask_rate": options.mask_rate,
    }
    return Plan("eval", tasks, {"run": Artifact(folder, identity, not tasks)}, figures)


def _require_heldout(lineage: Lineage, manifest: Mapping[str, Any] | None) -> None:
    """Raises UserError where the dataset has, or will have, no held-out residues."""
    dataset = lineage.dataset()
    if not (manifest["heldout_rows"] if manifest else lineage.scan.num_heldout_rows):
        raise UserError(
            f"eval scores held-out residues, of which {dataset.folder} has none",
            "set embed.holdout above 0 (and give it at least two proteins), or remove eval",
        )


def work(task: Task, context: Context) -> Mapping[str, Result]:
    assert context.experiment.eval is not None
    options = context.experiment.eval.fidelity
    (folder,) = task.folders
    metrics, latents = _fidelity(folder, options, context)
    # The files are about to be those of this task: the record of another's would be believed if sizes happened to agree.
    for other in read_parts(context.store, folder):
        if other.startswith("fidelity-") and other != task.id:
            context.store.delete(join(folder, "parts", f"{other}.json"))
    files = [
        context.store.write(join(folder, "eval", "metrics.json"), [canonical_json(metrics)]),
        _write_latents(context.store, join(folder, "eval", "latents.parquet"), latents),
    ]
    return {folder: Result(files, {"fvu": metrics["fidelity"]["fvu"]})}


def _fidelity(folder: str, options: Fidelity, context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    from plmsae_cli.evaluation.fidelity import loss_recovered, reconstruction
    from plmsae_cli.runtime.embedding import Embedder
    from plmsae_cli.runtime.saved import load_sae_with_facts
    from plmsae_cli.store.activations import ActivationShards, Statistics
    from plmsae_cli.store.proteins import read_proteins

    store = context.store
    lineage = Lineage(context.experiment, store)
    dataset = lineage.dataset()
    manifest = require_manifest(store, dataset.folder)
    saved = load_sae_with_facts(folder, store)
    mean_D = Statistics.read(store, join(dataset.folder, "stats.safetensors")).mean_D.float()
    shards = ActivationShards(store, dataset.folder, heldout=True)
    rows = manifest["heldout_rows"]
    seen = reconstruction(saved.model, shards, rows, mean_D)
    figures = seen.figures.result()
    table = read_proteins(store, join(dataset.folder, "proteins.parquet"), split="heldout")

    maximum_N = saved.model.maximum_N.cpu()
    fidelity: dict[str, Any] = {
        "fvu": figures["fvu"],
        "fvu_median_token": figures["fvu_median"],
        "cosine": figures["cosine"],
        "l0_mean": figures["l0_mean"],
        "l0_deciles": figures["l0_deciles"],
        # Dead over the training rows on which the maxima were taken: held-out rows are too few to call a latent dead.
        "dead_share": float((maximum_N == 0).float().mean()),
        "dead_window_tokens": saved.facts["maximum_rows"],
        "gamma": saved.facts["gamma"],
        "heldout_rows": rows,
        "heldout_proteins": len(table),
    }
    if options.loss_recovered:
        embedder = Embedder.shared(context.experiment.model.weights, store, "float32")
        budget = embedder.budget(options.batch_tokens)
        sequences = table["sequence"].to_pylist()[: options.proteins]
        loss = loss_recovered(
            embedder.model, saved.model, manifest["layer"], mean_D, sequences, options.mask_rate, budget,
            context.progress, context.check_stop,
        )  # fmt: skip
        fidelity["spliced_identity"] = loss.pop("spliced_identity")
        fidelity["loss"] = loss
    metrics = {
        "schema": 1,
        "demo": manifest["weights"]["name"] == "bundled",
        "layer": manifest["layer"],
        "architecture": saved.facts["config"]["architecture"],
        "num_latents": saved.model.num_latents,
        "k": saved.facts["config"].get("k"),
        "fidelity": fidelity,
    }
    return metrics, _latents(seen, maximum_N, rows, table)


def _require_same_model(weights: WeightsInfo, embedded: Mapping[str, str]) -> None:
    """Raises UserError where `train.data` was embedded with another model than `model.weights`."""
    if weights.sha256 != embedded["sha256"]:
        raise UserError(
            f"model.weights is {weights.name}, but the dataset was embedded with {embedded['name']}",
            "name that model, or set eval.fidelity.loss_recovered: false",
        )


def _latents(seen: Any, maximum_N: Any, rows: int, table: Any) -> dict[str, Any]:
    """Columns of latents.parquet."""
    from plmsae_cli.store.proteins import locate_rows

    firing_N = seen.figures.firing_N.cpu()
    top_N = seen.top_row_N.numpy()
    fired = top_N >= 0
    protein_N, residue_N = locate_rows(table, top_N.clip(min=0))
    ids, sequences = table["id"].to_pylist(), table["sequence"].to_pylist()
    contexts = [
        sequences[p][max(0, r - CONTEXT_RESIDUES) : r + CONTEXT_RESIDUES + 1]
        for p, r in zip(protein_N, residue_N, strict=True)
    ]
    return {
        "latent": list(range(len(top_N))),
        "density": (firing_N / rows).tolist(),
        "max": maximum_N.tolist(),
        "mean_active": (seen.activation_N / firing_N.clamp(min=1)).tolist(),
        "dead": (maximum_N == 0).tolist(),
        "top_activation": seen.figures.maximum_N.cpu().tolist(),
        "top_protein": [ids[p] if f else None for p, f in zip(protein_N, fired, strict=True)],
        "top_residue": [int(r) + 1 if f else None for r, f in zip(residue_N, fired, strict=True)],
        "top_context": [c if f else None for c, f in zip(contexts, fired, strict=True)],
        "top_context_offset": [
            min(int(r), CONTEXT_RESIDUES) if f else None for r, f in zip(residue_N, fired, strict=True)
        ],
    }


def _write_latents(store: Store, path: str, columns: Mapping[str, Any]) -> FileRecord:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), sink, compression="zstd")
    return store.write(path, [sink.getbuffer()])
