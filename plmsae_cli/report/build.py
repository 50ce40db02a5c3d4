"""The page of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from plmsae_cli.report import plots
from plmsae_cli.report.cells import Cell, Figure, Table, decimal, text
from plmsae_cli.report.evidence import sections
from plmsae_cli.report.examples import examples
from plmsae_cli.report.page import write_page
from plmsae_cli.report.prose import glossary, verdict
from plmsae_cli.report.provenance import artifact_rows, layer, model, provenance
from plmsae_cli.report.reading import Run, read_run
from plmsae_cli.report.table import browsing, interval, recovered, tiles, times
from plmsae_cli.report.words import clean, clean_block, count, number, percent, seconds
from plmsae_cli.runtime.foretold import compared


def build_report(run: Path) -> Path:
    """Write `<run>/report/index.html` from what the run folder holds, and return its path.

    Every part but resolved.yaml may be absent; its section is then left out.

    Raises:
        UserError: the folder is no run, or a file in it is damaged.
    """
    record = read_run(run)
    fidelity = record.fidelity
    evidence = sections(record.scores)
    foretold = _foretold(record)
    return write_page(
        run,
        "run.html",
        script="sort.js" if evidence or foretold else None,
        evidence=evidence,
        name=clean(record.name, 64),
        subtitle=_subtitle(record),
        verdict=verdict(record),
        demo=record.demo,
        tiles=tiles(record),
        provenance=provenance(record),
        artifacts=artifact_rows(record),
        training=_training(record),
        distribution=_distribution(record),
        fidelity=_fidelity(record),
        losses=_loss_rows(fidelity),
        details=_details(fidelity),
        num_proteins=(fidelity.get("loss") or {}).get("proteins"),
        browsing=browsing(record),
        described=_described(record),
        examples=examples(record.latents) if record.latents is not None else [],
        interesting=tuple(f"{100 * edge:g}%" for edge in plots.INTERESTING),
        times=_shown([(plots.stage_times(times(record), seconds), "Time of each stage", "")]),
        foretold=foretold,
        glossary=glossary(record),
        yaml=clean_block(record.yaml),
    )


def _foretold(run: Run) -> Table | None:
    """What each stage was predicted to take, beside what it took; None where nothing was predicted."""
    show: dict[str, tuple[str, Callable[[float], str]]] = {
        "seconds": ("time", seconds),
        "memory": ("memory a GPU", lambda value: f"{number(value / 1e9)} GB"),
        "usd": ("dollars", lambda value: f"{value:,.2f}"),
    }
    rows = []
    for stage, each in compared(run.folder, run.stage_seconds).items():
        for key, (name, words) in show.items():
            if key in each["predicted"] and key in each["measured"]:
                before, after = float(each["predicted"][key]), float(each["measured"][key])
                ratio = decimal(after / before, 2) if before else Cell("")
                rows.append(
                    [text(stage), Cell(name), Cell(words(before), repr(before)), Cell(words(after), repr(after)), ratio]
                )
    heads = [
        ("stage", False),
        ("figure", False),
        ("predicted", True),
        ("measured", True),
        ("measured / predicted", True),
    ]
    return Table(heads, rows, "Stages that were stopped and begun again count with all their time.") if rows else None


def _shown(figures: Sequence[tuple[Markup | None, str, str]]) -> list[Figure]:
    return [Figure(svg, title, caption) for svg, title, caption in figures if svg is not None]


def _subtitle(run: Run) -> str:
    where = layer(run)
    parts = [model(run), None if where is None else f"layer {where}", run.architecture]
    return " · ".join(clean(part, 80) for part in parts if part)


def _training(run: Run) -> list[Figure]:
    held_out = run.fidelity.get("fvu")
    reference = None if held_out is None else (held_out, f"held out {number(held_out)}")
    loss_keys = {"loss": "loss", "reconstruction": "reconstruction"}
    return _shown(
        [
            (
                plots.curve("loss", "loss", run.sae, loss_keys),
                "Loss",
                "Squared error a dimension, activations scaled to unit variance; the gap between the two"
                " lines is the auxiliary loss or the sparsity penalty.",
            ),
            (
                plots.curve("fvu", "FVU", run.sae, {"fvu": "FVU"}, reference=reference),
                "Unexplained variance",
                "",
            ),
            (
                plots.curve("dead", "dead latents (%)", run.sae, {"dead": "dead"}, scale=100, log=False),
                "Dead latents",
                "",
            ),
            (
                plots.curve("l0", "active latents (L0)", run.sae, {"l0": "L0"}),
                "Active latents",
                "The number is fixed by k." if len({line.get("l0") for line in run.sae}) == 1 else "",
            ),
            (plots.curve("plm-loss", "loss (nats)", run.plm, {"loss": "loss"}, from_zero=False), "Loss", ""),
            (plots.validation("perplexity", "perplexity", run.valid, "perplexity"), "Validation", ""),
        ]
    )


def _distribution(run: Run) -> list[Figure]:
    found: list[tuple[Markup | None, str, str]] = []
    fidelity, latents = run.fidelity, run.latents
    deciles = fidelity.get("l0_deciles")
    if latents is not None and latents.density.size:
        silent, width = int(np.count_nonzero(latents.density <= 0)), latents.density.size
        caption = "The grey band is where the table below looks."
        caption += f" {count(silent)} of {count(width)} latents never fired on the held-out residues"
        dead = fidelity.get("dead_share")
        caption += f"; {percent(dead)} count as dead." if dead is not None else "."
        if deciles and min(deciles) == max(deciles):
            caption += f" Every residue has exactly {number(deciles[0])} active latents."
        found.append((plots.density(latents, fidelity.get("heldout_rows")), "Density", caption))
    if deciles:
        mean = fidelity.get("l0_mean", float(np.mean(deciles)))
        caption = "Least, deciles and most over held-out residues."
        found.append((plots.active(deciles, mean), "Active latents a residue", caption))
    return _shown(found)


def _fidelity(run: Run) -> list[Figure]:
    fidelity = run.fidelity
    found: list[tuple[Markup | None, str, str]] = []
    if "fvu" in fidelity:
        tail = [line["fvu"] for line in run.sae[-max(1, len(run.sae) // 20) :]]
        caption = "A median below the whole means that a minority of residues carries much of the error."
        training = float(np.mean(tail)) if tail else None
        found.append((plots.unexplained(fidelity, training), "What is not explained", caption))
    if loss := recovered(fidelity, "masked"):
        found.append((plots.losses(loss), "The language model's loss", _way_back(loss)))
    return _shown(found)


def _way_back(loss: dict[str, Any]) -> str:
    names = {"recovered_zero": "zero", "recovered_mean": "mean"}
    found = {name: percent(loss[key]) for key, name in names.items() if key in loss}
    shares = " and ".join(f"{share} of what {name} ablation destroys" for name, share in found.items())
    return f"The dictionary preserves {shares}." if found else ""


def _details(fidelity: dict[str, Any]) -> list[tuple[str, str]]:
    names = {"cosine": "cosine", "gamma": "γ (gamma)"}
    found = [(name, number(fidelity[key])) for key, name in names.items() if fidelity.get(key) is not None]
    for key, name in {"fvu": "FVU", "cosine": "cosine", "l0_mean": "L0"}.items():
        if ends := fidelity.get(f"interval_{key}"):
            found.append((f"{name}, 95 %", "[{}, {}]".format(*(number(end) for end in ends))))
    if splice := fidelity.get("spliced_identity"):
        found.append(("splice check", clean(splice)))
    return found


def _described(run: Run) -> str | None:
    """How well descriptions of latents predict where they fire."""
    found = (run.scores or {}).get("features") or {}
    if "described" not in found:
        return None
    return (
        f"Descriptions of {count(found['described'])} latents were tried on unseen proteins: predicted against true activation,"
        f" mean Pearson {number(found['pearson'])}, Spearman {number(found['spearman'])}."
    )


def _loss_rows(fidelity: dict[str, Any]) -> list[dict[str, str]]:
    rows = []
    for inputs in ("masked", "unmasked"):
        loss = recovered(fidelity, inputs)
        if loss:
            row = {"inputs": inputs, "near_zero": interval(loss, "zero"), "near_mean": interval(loss, "mean")}
            row |= {key: number(loss[key], 4) for key in ("ce", "ce_sae", "ce_mean", "ce_zero") if key in loss}
            row |= {key: percent(loss[key]) for key in ("recovered_zero", "recovered_mean") if key in loss}
            row |= {key: number(loss[key]) for key in ("kl",) if key in loss}
            rows.append(row)
    return rows
