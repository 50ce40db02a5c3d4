"""What splices do, for the page of a run: contacts, structures and steering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmsae_cli.report.cells import ROWS, Cell, Section, Table, beyond, decimal, latent, text, whole
from plmsae_cli.report.words import clean, count, number, percent

METHODS = {"jacobian": "categorical Jacobian", "head": "attention head"}


def contacts(body: Mapping[str, Any]) -> Section:
    """The section of the axis `contacts`."""
    proteins = body["proteins"]
    lead = (
        f"Residues at least 24 apart whose CB atoms are closer than 8 Å, in {count(len(proteins))} structures"
        f" ({count(body['in_training'])} of their sequences in training): the share of contacts among the strongest"
        f" couplings, with the layer as it is, replaced by the reconstruction, and zeroed. By chance {number(body['chance'])}."
    )
    columns = [("Method", False), ("Pairs", False), ("Original", True), ("Dictionary", True), ("Zero ablation", True),
               ("Recovered", True), ("95 %", False)]  # fmt: skip
    rows = []
    for method, cuts in body["methods"].items():
        for cut, row in cuts.items():
            ends = row.get("interval_recovered")
            share = row.get("recovered")
            rows.append(
                [
                    Cell(METHODS[method]), Cell(cut), decimal(row["original"]), decimal(row["sae"]), decimal(row["zero"]),
                    Cell("" if share is None else percent(share), "" if share is None else repr(share)),
                    Cell(f"[{percent(ends[0])}, {percent(ends[1])}]" if ends else ""),
                ]
            )  # fmt: skip
    remark = "Recovered: (dictionary - zero) / (original - zero), of the means over structures."
    each_columns = [("Structure", False), ("Residues", True), ("Contacts", True)]
    each_columns += [(f"{METHODS[m]}, {v}", True) for m in body["methods"] for v in ("original", "dictionary")]
    each = [
        [
            text(one["id"]), whole(one["length"]), whole(one["contacts"]),
            *(decimal(one["precision"][m][v]["L"]) for m in body["methods"] for v in ("original", "sae")),
        ]
        for one in proteins[:ROWS]
    ]  # fmt: skip
    structures = Table(each_columns, each, beyond(len(proteins)).strip())
    tables = [("Precision", Table(columns, rows, remark)), ("Structures, P@L", structures)]
    return Section("contacts", "Contacts that survive", lead, [], tables)


def structure(body: Mapping[str, Any]) -> Section:
    """The section of the axis `structure`."""
    lead = (
        f"{count(body['proteins'])} proteins ({count(body['in_training'])} of their sequences in training) folded by"
        f" {clean(body['esmfold'])} from the hidden states of its language model, layer {body['layer']} replaced;"
        f" {count(body['references'])} have an experimental structure."
        + (" The folding head has random weights: these structures mean nothing." if body["demo"] else "")
    )
    columns = [("Hidden states", False), ("Layer", False), ("RMSD, Å", True), ("95 %", False), ("Mean distance, Å", True),
               ("TM", True), ("lDDT", True), ("pLDDT", True), ("RMSD to experiment, Å", True), ("TM to experiment", True),
               ("FVU", True), ("L0", True)]  # fmt: skip
    rows = []
    for row in body["folds"]:
        ends = row.get("interval_rmsd")
        name = row["variant"] if row["number"] is None else f"{row['variant']} {row['number']}"
        rows.append(
            [
                Cell(row["mode"]), Cell(name), decimal(row.get("rmsd"), 2),
                Cell("[{:.2f}, {:.2f}]".format(*ends) if ends else ""), decimal(row.get("mean_distance"), 2),
                decimal(row.get("tm")), decimal(row.get("lddt")), decimal(row.get("plddt"), 1),
                decimal(row.get("reference_rmsd"), 2), decimal(row.get("reference_tm")), decimal(row.get("fvu")),
                decimal(row.get("l0"), 1),
            ]
        )  # fmt: skip
    remark = (
        "Means over proteins, of CA atoms, against the prediction from all hidden states as they are. plain: that prediction;"
        " isolated: all hidden states but this layer zero; in_place: this layer replaced, the others kept; propagated: replaced"
        " where it is computed. Every fold is in eval/structure/folds.csv."
    )
    return Section("structure", "Structures that survive", lead, [], [("Folds", Table(columns, rows, remark))])


def steering(body: Mapping[str, Any]) -> Section:
    """The section of the axis `steering`."""
    lead = (
        f"Latents steered ({clean(body['mode'])}, residues: {clean(body['residues'])}) in {count(body['proteins'])}"
        f" proteins, all later layers computed anew; the change of predictions at masked residues. {count(body['found'])} of"
        f" {count(body['tests'])} effects differ from a random direction of equal length at a false discovery rate of"
        f" {percent(body['fdr'])}, {count(body['found_both'])} also from a random latent of like density;"
        f" of the effects of those random latents {count(body['found_null'])} differ from the direction, too."
        f" Mean KL: latents {number(body['kl'])}, random directions {number(body['kl_direction'])}, random latents"
        f" {number(body['kl_other'])}."
    )
    columns = [("Latent", True), ("Strength", True), ("KL", True), ("Sign flipped", True), ("Random direction", True),
               ("Random latent", True), ("Size (d)", True), ("q", True), ("Raises", False), ("by", True), ("q raised", True),
               ("Lowers", False), ("by ", True), ("q lowered", True)]  # fmt: skip
    rows = [
        [
            latent(row["latent"]), decimal(row["strength"], 2), decimal(row["kl"], 4),
            decimal(row["kl_flipped"], 4), decimal(row["kl_direction"], 4), decimal(row["kl_other"], 4),
            decimal(row["size"], 2), decimal(row["q"], 4), Cell(row["up"]["letter"]), decimal(row["up"]["effect"]),
            decimal(row["up"]["q"], 4), Cell(row["down"]["letter"]), decimal(row["down"]["effect"]),
            decimal(row["down"]["q"], 4),
        ]
        for row in sorted(body["latents"], key=lambda row: -row["kl"])[:ROWS]
    ]  # fmt: skip
    remark = (
        "KL and changes of log p in nats, means over proteins. Raised and lowered: the letters whose change differs most from"
        " that by the random direction. All read-outs and controls are in eval/steering/effects.parquet."
        f"{beyond(len(body['latents']))}"
    )
    tables = [("Latents", Table(columns, rows, remark))]
    if "folds" in body:
        tables.append(("Predicted structures", _steered_folds(body)))
    return Section("steering", "What latents do", lead, [], tables)


def _steered_folds(body: Mapping[str, Any]) -> Table:
    columns = [("Latent", True), ("Strength", True), ("SASA, %", True), ("Sign flipped", True), ("Random direction", True),
               ("Random latent", True), ("q", True), ("Contacts a residue", True), ("RMSD, Å", True),
               ("pLDDT", True)]  # fmt: skip
    rows = [
        [
            latent(row["latent"]), decimal(row["strength"], 2),
            *(decimal(row["sasa"][name], 1) for name in ("effect", "flipped", "direction", "other")),
            decimal(row["sasa"]["q"], 4), decimal(row["contacts"]["effect"]), decimal(row["rmsd"]["effect"], 2),
            decimal(row["plddt"]["effect"], 1),
        ]
        for row in sorted(body["latents"], key=lambda row: -abs(row["sasa"]["effect"]))[:ROWS]
    ]  # fmt: skip
    remark = f"Changes against the fold untouched, by {clean(body['esmfold'])}, means over proteins."
    return Table(columns, rows, remark + beyond(len(body["latents"])))
