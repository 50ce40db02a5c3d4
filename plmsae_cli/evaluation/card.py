"""The model card: what the dictionary is and what was measured, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def model_card(metrics: Mapping[str, Any], manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The card; axes that were not measured are left out.

    Args:
        metrics: contents of metrics.json.
        manifest: the dataset's manifest.
        facts: contents of sae.json.
    """
    return "\n".join(_lines(metrics, manifest, facts)) + "\n"


def _lines(metrics: Mapping[str, Any], manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[str]:
    weights = manifest["weights"]  # None where activations were imported and nobody says of which model
    of = "imported activations" if weights is None else weights["name"]
    yield f"# Sparse autoencoder of {of}, layer {metrics['layer']}"
    yield ""
    if metrics["demo"]:
        yield "**Trained on a demo model: not for science.**"
        yield ""
    yield "| | |"
    yield "|---|---|"
    yield f"| architecture | {metrics['architecture']} |"
    yield f"| latents | {metrics['num_latents']:,} |"
    if metrics["k"] is not None:
        yield f"| active a residue (k) | {metrics['k']} |"
    if "imported" in facts:
        yield f"| imported from | {facts['imported']['path']} ({facts['imported']['format']}) |"
    else:
        yield f"| training rows | {manifest['rows']:,} |"
        yield f"| tokens | {facts.get('tokens', 0):,} |"
    if weights is not None:
        yield f"| weights, sha256 | `{weights['sha256'][:16]}` |"
    makers = {
        "fidelity": _fidelity,
        "concepts": _concepts,
        "families": _families,
        "probes": _probes,
        "contacts": _contacts,
        "structure": _structure,
        "steering": _steering,
    }
    for axis, make in makers.items():
        if axis in metrics:
            yield from make(metrics[axis])


def _fidelity(body: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", "## Fidelity", "")
    low, high = body["interval_fvu"]
    yield f"FVU {body['fvu']:.3f} [{low:.3f}, {high:.3f}], mean L0 {body['l0_mean']:.1f},"
    yield f"dead latents {100 * body['dead_share']:.1f} %,"
    yield f"on {body['heldout_rows']:,} held-out residues."
    if "loss" not in body:
        return
    yield from (
        f"Cross-entropy in nats on {body['loss']['proteins']:,} held-out proteins; recovered: (ablated - dictionary) / (ablated -"
        " original); 95 % intervals over proteins.",
        "",
        "| inputs | original | dictionary | zero ablation | mean ablation | KL | recovered, zero | recovered, mean |",
        "|---|---|---|---|---|---|---|---|",
    )
    for inputs in ("masked", "unmasked"):
        row = body["loss"][inputs]
        losses = " | ".join(f"{row[name]:.3f}" for name in ("ce", "ce_sae", "ce_zero", "ce_mean"))
        yield f"| {inputs} | {losses} | {row['kl']:.4f} | {_share(row, 'recovered_zero')} | {_share(row, 'recovered_mean')} |"


def _share(row: Mapping[str, Any], name: str) -> str:
    """A share in percent with its interval, as far as they are known."""
    if name not in row:
        return ""
    return f"{100 * row[name]:.1f} %" + _interval(row, name, 100.0, 1)


def _interval(row: Mapping[str, Any], name: str, scale: float, places: int) -> str:
    ends = row.get(f"interval_{name}")
    return " [{}]".format(", ".join(f"{scale * end:.{places}f}" for end in ends)) if ends else ""


def _concepts(body: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", f"## Concepts ({body['mode']})", "")
    tally = body["proteins"]
    fate = "left out" if body["mode"] == "strict" else "kept"
    yield f"{tally['used']:,} proteins; {tally['in_training']:,} of those read were in training, and {fate}."
    yield f"Halves by {body['split']}; {body['concepts']:,} concepts scored, each by the latent that is best on the other half."
    yield from (
        "",
        "| code | concepts with F1 > 0.5 | latents with F1 > 0.5 | mean best F1 (95 %) |",
        "|---|---|---|---|",
    )
    for name in body["order"]:
        row = body["codes"][name]
        low, high = row["interval_mean_f1"]
        yield f"| {name} | {row['concepts_above']} | {row['latents_above']} | {row['mean_f1']:.3f} [{low:.3f}, {high:.3f}] |"


def _families(body: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", f"## Families ({body['mode']})", "")
    tally = body["proteins"]
    yield f"{tally['used']:,} proteins, {body['classes']:,} classes; {tally['in_training']:,} of those read were in training."
    yield f"{body['specific']:,} family-specific latents (F1 > 0.7); with labels permuted {body['specific_permuted']:,}."
    yield f"{body['found']:,} classes found with F1 > 0.5 by their best latent of train; permuted {body['found_permuted']:,}."
    yield from ("", "| pattern | latents |", "|---|---|")
    for name in ("dead", "point", "periodic", "short", "medium", "long", "whole"):
        yield f"| {name} | {body['patterns'][name]:,} |"


def _probes(body: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", "## Probes", "")
    yield f"{len(body['targets']):,} targets; test AUROC, mean over targets: best single latent {body['mean_auroc_single']:.3f},"
    yield f"all latents {body['mean_auroc_all']:.3f}, the activations behind them {body['mean_auroc_raw']:.3f}."
    nulls = [body[f"mean_auroc_{kind}_null"] for kind in ("single", "all")]
    if None not in nulls:
        yield "On labels that say nothing (rotated along proteins, or dealt out anew) {:.3f} and {:.3f}.".format(*nulls)


def _contacts(body: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", "## Contacts", "")
    yield f"Structures: {len(body['proteins']):,}, long range; {body['in_training']:,} of their sequences were in training."
    yield f"By chance {body['chance']:.3f}. Recovered: (dictionary - zero) / (original - zero)."
    yield from (
        "",
        "| method | pairs | original | dictionary | zero ablation | recovered |",
        "|---|---|---|---|---|---|",
    )
    for method, cuts in body["methods"].items():
        for cut, row in cuts.items():
            found = [f"{row[name]:.3f}{_interval(row, name, 1.0, 3)}" for name in ("original", "sae", "zero")]
            yield f"| {method} | {cut} | {' | '.join(found)} | {_share(row, 'recovered')} |"


def _structure(body: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", "## Structure", "")
    yield f"{body['proteins']:,} proteins folded by {body['esmfold']}; {body['references']:,} have an experimental structure,"
    yield f"{body['in_training']:,} of their sequences were in training. RMSD of CA after superposition, means over proteins."
    if body["demo"]:
        yield from ("", "**The folding head has random weights: these structures mean nothing.**")
    yield from (
        "",
        "| hidden states | layer | RMSD to the original prediction | TM | lDDT | pLDDT | RMSD to experiment |",
        "|---|---|---|---|---|---|---|",
    )
    for row in body["folds"]:
        name = row["variant"] if row["number"] is None else f"{row['variant']} {row['number']}"
        figures = [
            f"{row[key]:.{places}f}{_interval(row, key, 1.0, places)}" if key in row else ""
            for key, places in _STRUCTURE_COLUMNS
        ]
        yield f"| {row['mode']} | {name} | {' | '.join(figures)} |"


_STRUCTURE_COLUMNS = (("rmsd", 2), ("tm", 3), ("lddt", 3), ("plddt", 1), ("reference_rmsd", 2))


def _steering(body: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", f"## Steering ({body['mode']})", "")
    number = len({row["latent"] for row in body["latents"]})
    yield f"{number:,} latents in {body['proteins']:,} proteins; mean KL of predictions at masked residues:"
    yield f"latents {body['kl']:.4f}, random directions {body['kl_direction']:.4f}, random latents {body['kl_other']:.4f} nats."
    yield f"{body['found']:,} of {body['tests']:,} effects differ from a random direction, false discovery rate {body['fdr']};"
    yield f"of the effects of random latents {body['found_null']:,} do."
    yield from ("", "| latent | strength | KL | random direction | raises | lowers |", "|---|---|---|---|---|---|")
    for row in sorted(body["latents"], key=lambda row: -row["kl"])[:20]:
        sides = [f"{row[s]['letter']} {row[s]['effect']:+.3f} (q {row[s]['q']:.3g})" for s in ("up", "down")]
        yield f"| {row['latent']} | {row['strength']:g} | {row['kl']:.4f} | {row['kl_direction']:.4f} | {' | '.join(sides)} |"
    if "folds" in body:
        head = "a random folding head, so they mean nothing" if body["esmfold"] == "random" else body["esmfold"]
        yield from (
            "",
            f"Folded by {head}; change of the solvent-accessible surface, mean over proteins:",
            "",
        )
        yield from (
            "| latent | strength | SASA | sign flipped | random direction | random latent | q |",
            "|---|---|---|---|---|---|---|",
        )
        for row in sorted(body["latents"], key=lambda row: -abs(row["sasa"]["effect"]))[:20]:
            changes = [f"{row['sasa'][name]:+.1f} %" for name in ("effect", "flipped", "direction", "other")]
            yield f"| {row['latent']} | {row['strength']:g} | {' | '.join(changes)} | {row['sasa']['q']:.3g} |"
