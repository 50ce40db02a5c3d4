"""The axis `fidelity`: one task over held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.runtime.task import Context, Result, Task
from plmsae_cli.store.fs import join

AXIS = "fidelity"
CONTEXT_RESIDUES = 10
"""Residues shown on either side of a latent's strongest one."""


def plan(scope: Scope) -> tuple[list[Task], Mapping[str, Any]]:
    """The task, and figures for people."""
    options = scope.options.fidelity
    _require_heldout(scope)
    if options.loss_recovered:
        scope.require_same_model("set eval.fidelity.loss_recovered: false")
    figures = {
        "loss_recovered": options.loss_recovered,
        "proteins": options.proteins if options.proteins is not None else "all held out",
        "mask_rate": options.mask_rate,
    }
    return [scope.task(AXIS, scope.identity(AXIS, options.science()))], figures


def _require_heldout(scope: Scope) -> None:
    """Raises UserError where the dataset has, or will have, no held-out residues."""
    rows = scope.manifest["heldout_rows"] if scope.manifest else scope.lineage.scan.num_heldout_rows
    if not rows:
        raise UserError(
            f"eval scores held-out residues, of which {scope.dataset} has none",
            "set embed.holdout above 0 (and give it at least two proteins), or remove eval",
        )


def work(task: Task, scope: Scope, context: Context) -> Result:
    import torch

    from plmsae_cli.evaluation.fidelity import loss_recovered, reconstruction, reconstruction_intervals
    from plmsae_cli.runtime.embedding import Embedder
    from plmsae_cli.runtime.saved import load_sae_with_facts
    from plmsae_cli.store.activations import ActivationShards, Statistics
    from plmsae_cli.store.proteins import read_proteins

    options, store = scope.options.fidelity, scope.store
    manifest = scope.made()
    saved = load_sae_with_facts(scope.folder, store)
    mean_D = Statistics.read(store, join(scope.dataset, "stats.safetensors")).mean_D.float()
    shards = ActivationShards(store, scope.dataset, heldout=True)
    rows = manifest["heldout_rows"]
    table = read_proteins(store, join(scope.dataset, "proteins.parquet"), split="heldout")
    lengths_P = torch.from_numpy(table["rows"].to_numpy().astype("int64"))
    assert int(lengths_P.sum()) == rows
    seen = reconstruction(saved.model, shards, lengths_P, mean_D)
    figures = seen.figures.result()

    maximum_N = saved.model.maximum_N.cpu()
    fidelity: dict[str, Any] = {
        "fvu": figures["fvu"],
        "fvu_median_token": figures["fvu_median"],
        "cosine": figures["cosine"],
        "l0_mean": figures["l0_mean"],
        "l0_deciles": figures["l0_deciles"],
        **reconstruction_intervals(seen.sums_5P),
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
        sequences: Sequence[str] = table["sequence"].to_pylist()[: options.proteins]
        loss = loss_recovered(
            embedder.model, saved.model, manifest["layer"], mean_D, sequences, options.mask_rate, budget,
            context.progress, context.check_stop,
        )  # fmt: skip
        fidelity["spliced_identity"] = loss.pop("spliced_identity")
        fidelity["loss"] = loss
    files = [
        scope.write_json(AXIS, "result.json", fidelity),
        scope.write_table(AXIS, "latents.parquet", _latents(seen, maximum_N, rows, table)),
    ]
    return Result(files, {"fvu": fidelity["fvu"]})


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
