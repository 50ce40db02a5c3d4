"""The figures of a run: for the terminal, for the tiles of the page, for its tables."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from plmsae_cli.report.models import lines
from plmsae_cli.report.reading import STAGE_ORDER, Run, read_run
from plmsae_cli.report.words import clean, count, magnitude, number, percent, seconds


class Tile(NamedTuple):
    """One large figure with its name above and a remark below."""

    name: str
    value: str
    remark: str = ""


def summary(run: Path) -> list[tuple[str, str]]:
    """The figures of a run folder as (name, value), for a table in a terminal; absent ones are left out.

    Raises:
        UserError: the folder is no run, or a file in it is damaged.
    """
    return list(_summary(read_run(run)))


def _summary(run: Run) -> Iterator[tuple[str, str]]:
    fidelity = run.fidelity
    if "fvu" in fidelity:
        yield "FVU", number(fidelity["fvu"])
    if "l0_mean" in fidelity:
        yield "L0", number(fidelity["l0_mean"])
    if "dead_share" in fidelity:
        yield "dead latents", percent(fidelity["dead_share"])
    masked = recovered(fidelity, "masked")
    if "recovered_zero" in masked:
        yield "loss recovered, zero ablation", percent(masked["recovered_zero"]) + interval(masked, "zero")
    if "recovered_mean" in masked:
        yield "loss recovered, mean ablation", percent(masked["recovered_mean"]) + interval(masked, "mean")
    scored = run.scores or {}
    if concepts := scored.get("concepts"):
        yield "concepts found (F1 > 0.5)", f"{concepts['codes']['sae']['concepts_above']} of {concepts['concepts']}"
    if families := scored.get("families"):
        yield "family-specific latents", count(families["specific"])
    if probes := scored.get("probes"):
        yield "probes, AUROC of one latent", number(probes["mean_auroc_single"])
        yield "probes, AUROC of all latents", number(probes["mean_auroc_all"])
    for method, cuts in scored.get("contacts", {}).get("methods", {}).items():
        body = cuts["L"]
        share = f", {percent(body['recovered'])} recovered" if "recovered" in body else ""
        yield f"contacts by {method}, P@L", f"{number(body['sae'])} (model {number(body['original'])}){share}"
    for mode, fold in scored.get("structure", {}).get("dictionary", {}).items():
        yield f"structure, {mode}", f"RMSD {number(fold['rmsd'])} Å, TM {number(fold['tm'])}"
    if steering := scored.get("steering"):
        yield "steering effects found", f"{count(steering['found'])} of {count(steering['tests'])}"
    yield from lines(scored)
    if (command := browsing(run)) is not None:
        yield "pages of latents", command
    for name, scores in final_validation(run).items():
        yield f"perplexity, {clean(name, 40)}", number(scores["perplexity"])
    if (rows := training_rows(run)) is not None:
        yield "training rows", count(rows)
    if "heldout_rows" in fidelity:
        yield "held-out rows", count(fidelity["heldout_rows"])
    if run.num_latents is not None:
        yield "latents", count(run.num_latents)
    for stage, spent in times(run).items():
        yield f"time, {clean(stage, 40)}", seconds(spent)


def browsing(run: Run) -> str | None:
    """The command that opens the pages of the latents; None where the run has none."""
    if "features" not in (run.scores or {}):
        return None
    return f"plmsae browse {clean(shlex.quote(str(run.folder)), 400)}"


def tiles(run: Run) -> list[Tile]:
    """The figures at the head of the page, the ones that decide whether to read on first."""
    fidelity, found = run.fidelity, []
    masked = recovered(fidelity, "masked")
    if "fvu" in fidelity:
        median = fidelity.get("fvu_median_token")
        remark = "" if median is None else f"median residue {number(median)}"
        found.append(Tile("FVU", number(fidelity["fvu"]), remark))
    if "recovered_zero" in masked:
        remark = "zero ablation, masked" + interval(masked, "zero")
        found.append(Tile("Loss recovered", percent(masked["recovered_zero"]), remark))
    if "recovered_mean" in masked:
        remark = "mean ablation, masked" + interval(masked, "mean")
        found.append(Tile("Loss recovered", percent(masked["recovered_mean"]), remark))
    if "l0_mean" in fidelity:
        remark = f"of {count(run.num_latents)} latents" if run.num_latents else "active latents"
        found.append(Tile("L0", number(fidelity["l0_mean"]), remark))
    if "dead_share" in fidelity:
        window = fidelity.get("dead_window_tokens")
        remark = f"over {magnitude(window)} residues" if window else ""
        found.append(Tile("Dead latents", percent(fidelity["dead_share"]), remark))
    for name, scores in final_validation(run).items():
        found.append(Tile("Perplexity", number(scores["perplexity"]), clean(name, 30)))
    trained = run.sae or run.plm
    if trained:
        rows = training_rows(run)
        remark = "residues" if rows is None else f"residues, from {count(rows)} rows"
        found.append(Tile("Trained on", magnitude(trained[-1]["tokens"]), remark))
        speeds = [line["tokens_per_second"] for line in trained if line.get("tokens_per_second")]
        if speeds:
            found.append(Tile("Speed", magnitude(float(np.median(speeds))), "residues/s, median of training"))
    if run.stage_seconds:
        total = sum(run.stage_seconds.values())
        found.append(Tile("Time", seconds(total), f"{len(run.stage_seconds)} stages"))
    return found


def recovered(fidelity: dict[str, Any], inputs: str) -> dict[str, Any]:
    """The language-model losses on `masked` or `unmasked` inputs, {} where they were not measured."""
    return (fidelity.get("loss") or {}).get(inputs) or {}


def interval(loss: dict[str, Any], ablation: str) -> str:
    """The 95 % interval of the loss recovered, `zero` or `mean`, in brackets after a space, or nothing."""
    ends = loss.get(f"interval_recovered_{ablation}")
    return f" [{percent(ends[0], ends[1])}, {percent(ends[1], ends[0])}]" if ends else ""


def final_validation(run: Run) -> dict[str, dict[str, float]]:
    """A protein language model's last scores by validation set."""
    return run.valid[-1]["valid"] if run.valid else {}


def perplexity(run: Run) -> float | None:
    """A protein language model's last perplexity, the mean over validation sets."""
    values = [float(scores["perplexity"]) for scores in final_validation(run).values()]
    return sum(values) / len(values) if values else None


def training_rows(run: Run) -> int | None:
    """Rows (residues) of the dataset, from the artifact nearest to training that says."""
    if (rows := run.dictionary.get("dataset_rows")) is not None:
        return int(rows)
    for stage in ("optimize", "shuffle", "embed"):
        for name, facts in run.artifacts.items():
            # A stage with several layers has one artifact a layer, all of the same rows: embed-3, embed-6.
            if name.partition("-")[0] == stage and facts.get("rows") is not None:
                return int(facts["rows"])
    return None


def times(run: Run) -> dict[str, float]:
    """Seconds by stage, in the order of the pipeline, unknown stages last."""
    known = [stage for stage in STAGE_ORDER if stage in run.stage_seconds]
    return {stage: run.stage_seconds[stage] for stage in dict.fromkeys([*known, *run.stage_seconds])}
