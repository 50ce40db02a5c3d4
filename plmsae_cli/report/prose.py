"""Sentences: the verdict of a run, and how to read each of its numbers."""

from __future__ import annotations

import math
from typing import Any

from plmsae_cli.report.provenance import layer
from plmsae_cli.report.reading import Run
from plmsae_cli.report.table import final_validation, recovered
from plmsae_cli.report.words import clean, count, magnitude, number, percent

_GRADES = ((0.1, "very closely"), (0.25, "closely"), (0.5, "roughly"), (math.inf, "poorly"))
"""Largest FVU that still deserves the word."""

_READING = {
    "FVU": (
        "Fraction of variance unexplained, Σ‖x − x̂‖² / Σ‖x − mean‖² with the mean over the "
        "training set: 0 is a perfect reconstruction, 1 is no better than always answering the "
        "mean."
    ),
    "Median residue": (
        "The same ratio residue by residue, and then the median: it ignores the few residues that are hardest."
    ),
    "Cosine": (
        "Mean cosine between an activation and its reconstruction: whether the direction is right, whatever the length."
    ),
    "L0": ("Number of latents that are active on a residue; fewer are easier to read."),
    "Dead latents": (
        "Share of latents that never fired on the training residues over which they were watched: "
        "capacity that was paid for and is not used."
    ),
    "Density": (
        "Share of held-out residues on which a latent fires: near 1 it says little, near 0 it can hardly be checked."
    ),
    "Cross-entropy": (
        "Average surprise of the language model at the true amino acid, in nats: lower is better, "
        "guessing among 20 costs 3."
    ),
    "Loss recovered": (
        "1 − (CE with the dictionary − CE) / (CE ablated − CE): 100% if the model cannot tell the "
        "reconstruction from its own activations, 0% if the layer might as well be gone."
    ),
    "Zero and mean ablation": (
        "What “gone” means: the layer replaced by zeros, or by its mean, which is the harder comparison."
    ),
    "Masked and unmasked": (
        "Masked hides the residues that are scored, which is the model's real task; unmasked lets "
        "it see them, so nearly everything is recovered at no cost."
    ),
    "KL": (
        "Kullback–Leibler divergence: how far the predicted distribution moves when the "
        "reconstruction is put in, in nats; 0 is not at all."
    ),
    "Brackets": ("95% interval from resampling whole proteins: what another draw of proteins would plausibly give."),
    "γ (gamma)": (
        "Length of the mean activation over the standard deviation around it; large values "
        "predict dead latents in dictionaries whose inputs are not centred (these are)."
    ),
    "Perplexity": ("The exponential of the loss: between how many amino acids, equally likely, the model hesitates."),
    "Splice check": (
        "Putting the unchanged activations back changed no bit of the model's output, so the "
        "differences above come from the dictionary alone."
    ),
}


def verdict(run: Run) -> str:
    """What came out, in one sentence that needs no glossary."""
    fidelity = run.fidelity
    if "fvu" in fidelity:
        return _of_dictionary(run, fidelity)
    if validation := final_validation(run):
        name, scores = next(iter(validation.items()))
        return (
            f"After {magnitude(run.plm[-1]['tokens']) if run.plm else 'some'} residues the language model"
            f" hesitates between {number(scores['perplexity'])} amino acids at a hidden position of the set"
            f" “{clean(name, 40)}” (20 would be guessing) and names the right one in"
            f" {percent(scores['accuracy'])} of the cases."
        )
    if run.sae:
        last = run.sae[-1]
        return (
            f"Trained on {magnitude(last['tokens'])} residues; the last batches leave {percent(last['fvu'])}"
            " of the variance unexplained. It has not been scored on held-out proteins."
        )
    if run.plm:
        last = run.plm[-1]
        return f"Trained on {magnitude(last['tokens'])} residues to a loss of {number(last['loss'])} nats."
    if models := ((run.scores or {}).get("lm") or {}).get("models"):
        best = min(models, key=lambda row: row["loss"])
        return (
            f"Of {count(len(models))} language model{'s' if len(models) > 1 else ''}, {clean(best['model'], 40)} predicts hidden"
            f" residues best: {number(best['loss'], 4)} nats, the right one in {percent(best['accuracy'])} of the cases."
        )
    if models := ((run.scores or {}).get("representations") or {}).get("models"):
        best = max(models, key=lambda row: row["score"])
        return f"Most can be read off the layers of {clean(best['model'], 40)}: {number(best['score'])} on average over tasks."
    return "This run has recorded what was asked, and no results yet."


def _of_dictionary(run: Run, fidelity: dict[str, Any]) -> str:
    grade = next(word for limit, word in _GRADES if not fidelity["fvu"] > limit)
    where = "the layer" if layer(run) is None else f"layer {layer(run)}"
    of_all = f" of {count(run.num_latents)}" if run.num_latents else ""
    active = fidelity.get("l0_mean")
    opening = "T" if active is None else f"With {number(active)}{of_all} latents active on a residue, t"
    text = f"{opening}he dictionary reconstructs {where} {grade}: it explains"
    text += f" {percent(1 - fidelity['fvu'])} of the variance"
    kept = recovered(fidelity, "masked").get("recovered_zero")
    if kept is not None and math.isfinite(kept):
        text += f" and preserves {percent(kept)} of what the layer contributes to predicting hidden residues"
    dead = fidelity.get("dead_share")
    if dead is not None:
        text += f"; {percent(dead)} of its latents are dead" if dead > 0 else "; none of its latents is dead"
    return text + "."


def glossary(run: Run) -> list[tuple[str, str]]:
    """Each kind of number that the page shows, and the sentence that explains it."""
    fidelity = run.fidelity
    masked = recovered(fidelity, "masked")
    trained = bool(run.sae)
    shown = {
        "FVU": trained or "fvu" in fidelity,
        "Median residue": "fvu_median_token" in fidelity,
        "Cosine": "cosine" in fidelity,
        "L0": trained or "l0_mean" in fidelity,
        "Dead latents": trained or "dead_share" in fidelity,
        "Density": run.latents is not None,
        "Cross-entropy": bool(masked),
        "Loss recovered": "recovered_zero" in masked,
        "Zero and mean ablation": "recovered_mean" in masked,
        "Masked and unmasked": bool(masked),
        "KL": "kl" in masked,
        "Brackets": bool(masked.get("interval_recovered_zero")),
        "γ (gamma)": "gamma" in fidelity,
        "Perplexity": bool(run.valid),
        "Splice check": fidelity.get("spliced_identity") == "exact",
    }
    return [(name, text) for name, text in _READING.items() if shown[name]]
