"""All read-outs of all steers as tables: effects with their controls, and one row a latent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.evaluation.steering.edits import VARIANTS, steers
from plmsae_cli.evaluation.steering.effects import benjamini_hochberg, effect_rows
from plmsae_cli.evaluation.steering.folds import READOUTS as FOLDED
from plmsae_cli.plm.alphabet import AMINO_ACIDS
from plmsae_cli.runtime.task import Result

if TYPE_CHECKING:
    from plmsae_cli.config.evaluation import Steering

AXIS = "steering"
KL = "KL"
READOUTS = [KL, *AMINO_ACIDS]


def report(scope: Scope, options: Steering, of: int) -> Result:
    """Merge the pieces' read-outs and test them."""
    from plmsae_cli.runtime.saved import read_sae_facts

    chosen = scope.read_json(AXIS, "chosen.json")
    order = steers(chosen, options.strengths)
    density = dict(zip(chosen["latents"], chosen["density"], strict=True))
    trained = scope.read_table(AXIS, "proteins.parquet")["in_training"].to_pylist()
    proteins = len(trained)
    readouts = READOUTS if options.esmfold is None else [*READOUTS, *FOLDED]
    shape = (len(VARIANTS), proteins, len(readouts))
    values: dict[int, Any] = {}
    for index in range(of):
        table = scope.read_table(AXIS, f"values/{index}of{of}.parquet")
        cells = table["values"].to_numpy() if "values" in table.column_names else []
        values |= {index + of * n: cell.reshape(shape) for n, cell in enumerate(cells)}
    rows: list[dict[str, Any]] = []
    for place, steer in enumerate(order):
        facts = {
            "latent": steer.latent,
            "strength": steer.strength,
            "density": density[steer.latent],
            "other_latent": steer.other,
        }
        rows += effect_rows(values[place], readouts, facts)
    for name in ("", "_other", "_null"):
        q_M = benjamini_hochberg(np.array([row[f"p{name}"] for row in rows]))
        for row, q in zip(rows, q_M.tolist(), strict=True):
            row[f"q{name}"] = q
    latents = [_of_steer(rows[n : n + len(readouts)]) for n in range(0, len(rows), len(readouts))]
    body = {
        "mode": options.mode,
        "residues": options.residues if isinstance(options.residues, str) else f"{len(options.residues)} positions",
        "strengths": options.strengths,
        "proteins": proteins,
        "in_training": sum(trained),
        "fdr": options.fdr,
        "tests": len(rows),
        "found": sum(row["q"] <= options.fdr for row in rows),
        "found_both": sum(row["q"] <= options.fdr and row["q_other"] <= options.fdr for row in rows),
        "found_null": sum(row["q_null"] <= options.fdr for row in rows),
        "latents_found": len({row["latent"] for row in rows if row["q"] <= options.fdr}),
        "kl": float(np.mean([row["kl"] for row in latents])),
        "kl_direction": float(np.mean([row["kl_direction"] for row in latents])),
        "kl_other": float(np.mean([row["kl_other"] for row in latents])),
        "latents": latents,
    }
    if options.esmfold is not None:
        body |= {"esmfold": options.esmfold, "folds": scope.read_json(AXIS, f"folds/0of{of}.json")["proteins"]}
    number = read_sae_facts(scope.folder, scope.store)["config"]["num_latents"]
    files = [
        scope.write_json(AXIS, "result.json", body),
        scope.write_table(AXIS, "effects.parquet", {name: [row[name] for row in rows] for name in rows[0]}),
        scope.write_table(AXIS, "latents.parquet", _columns(latents, number)),
    ]
    return Result(files, {"latents": len(chosen["latents"]), "found": body["found"]})


def _of_steer(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One latent at one strength: its KL, and the letters it raises and lowers most against the random direction."""
    kl, letters, folded = rows[0], rows[1 : len(READOUTS)], rows[len(READOUTS) :]
    columns = ("effect", "direction", "other", "flipped", "q")
    up = max(letters, key=lambda row: row["effect"] - row["direction"])
    down = min(letters, key=lambda row: row["effect"] - row["direction"])
    return {
        **{name: kl[name] for name in ("latent", "strength", "density", "other_latent", "size", "p", "q", "q_other")},
        "kl": kl["effect"],
        "kl_flipped": kl["flipped"],
        "kl_direction": kl["direction"],
        "kl_other": kl["other"],
        **{
            side: {
                "letter": row["readout"],
                **{name: row[name] for name in columns},
            }
            for side, row in (("up", up), ("down", down))
        },
        **{row["readout"].lower(): {name: row[name] for name in columns} for row in folded},
    }


def _columns(latents: Sequence[dict[str, Any]], number: int) -> dict[str, list[Any]]:
    """Columns of latents.parquet, at the largest strength; null for latents that were not steered."""
    best: dict[int, dict[str, Any]] = {}
    for row in latents:
        if row["latent"] not in best or abs(row["strength"]) > abs(best[row["latent"]]["strength"]):
            best[row["latent"]] = row
    found: dict[str, list[Any]] = {"latent": list(range(number))}
    for name in ("kl", "kl_direction", "size", "q"):
        found[f"steering_{name}"] = [best[n][name] if n in best else None for n in range(number)]
    for side in ("up", "down"):
        found[f"steering_{side}"] = [best[n][side]["letter"] if n in best else None for n in range(number)]
        found[f"steering_{side}_effect"] = [best[n][side]["effect"] if n in best else None for n in range(number)]
    for name in (name.lower() for name in FOLDED if name.lower() in latents[0]):
        for column in ("effect", "q"):
            values = [best[n][name][column] if n in best else None for n in range(number)]
            found[f"steering_{name}" + ("_q" if column == "q" else "")] = values
    return found
