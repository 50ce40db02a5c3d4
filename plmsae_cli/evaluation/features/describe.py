"""Prompts for a language model that describes latents, and how well its answers predict activations on unseen proteins.

Files of `eval/features/describe/`: `prompts.jsonl`, `scoring.jsonl` (what to answer), `truth.parquet` (what is true, for us),
`latents.parquet` (what came of it). No network: whoever has a model answers the prompts and names the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.features import Describe
from plmsae_cli.evaluation.features import layout
from plmsae_cli.evaluation.features.job import Job
from plmsae_cli.evaluation.features.reading import Side
from plmsae_cli.evaluation.features.unseen import KINDS, Questions, correlations, questions
from plmsae_cli.evaluation.frame import write_table
from plmsae_cli.store.fs import FileRecord
from plmsae_cli.store.tables import read_table

FOLDER = "describe"
ANSWERS = (FOLDER, "latents.parquet")
STEPS = 10
_TASK = (
    "A latent of a sparse autoencoder on a protein language model is active on some residues. Below are stretches of proteins; a"
    " residue on which it is active is followed by its activation from 1 to 10 in brackets. Say in one sentence what the residues"
    " have in common. Answer with a line of JSON: "
)


def describe(job: Job, written: list[str]) -> list[FileRecord]:
    """All files of the folder."""
    options = job.options.describe
    assert options is not None
    asked, side = questions(job, options.heldout)
    latents = pa.concat_tables([read_table(job.scope.store, path) for path in written])
    store = job.scope.store
    truth = {
        "latent": asked.latent_Q, "example": _names(asked), "kind": [KINDS[kind] for kind in asked.kind_Q],
        "row": asked.row_Q, "activation": asked.truth_Q,
    }  # fmt: skip
    answers = _answers(job, options, asked)
    return [
        store.write(job.path(FOLDER, "prompts.jsonl"), _prompts(job, options, latents)),
        store.write(job.path(FOLDER, "scoring.jsonl"), [_scoring(options, asked, side)]),
        write_table(store, job.path(FOLDER, "truth.parquet"), truth),
        write_table(store, job.path(*ANSWERS), answers),
    ]


def _names(asked: Questions) -> list[str]:
    return [f"{latent}-{number}" for latent, number in zip(asked.latent_Q, asked.number_Q, strict=True)]


def _scoring(options: Describe, asked: Questions, side: Side) -> bytes:
    """A line a question: the stretch and which of its residues is meant."""
    sequences = side.proteins(["sequence"])["sequence"].to_pylist()
    protein_Q = side.protein_of(asked.row_Q)
    lines = []
    for name, latent, row, protein in zip(_names(asked), asked.latent_Q, asked.row_Q, protein_Q, strict=True):
        place = int(row - side.offset_P[protein])
        start = max(0, place - options.window)
        stretch = sequences[protein][start : place + options.window + 1]
        lines.append({"example": name, "latent": int(latent), "sequence": stretch, "residue": place - start + 1})
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _prompts(job: Job, options: Describe, latents: pa.Table) -> Iterator[bytes]:
    """A line a latent that fires, group after group."""
    proteins = _by_number(read_table(job.scope.store, job.path(layout.PROTEINS)))
    concepts: dict[int, list[str]] = {}
    if job.has_concepts:
        table = read_table(job.scope.store, job.path(layout.CONCEPTS)).select(["latent", "concept"])
        for row in table.to_pylist():
            concepts.setdefault(row["latent"], []).append(row["concept"])
    maximum_N = latents["max"].to_numpy()
    for group in range(job.groups):
        job.context.check_stop()
        by_latent: dict[int, list[dict[str, Any]]] = {}
        for row in read_table(job.scope.store, job.path(layout.group_file(group))).to_pylist():
            by_latent.setdefault(row["latent"], []).append(row)
        for latent, rows in by_latent.items():
            chosen = _chosen(rows, options.examples)
            lines = [_line(row, proteins[row["protein"]], float(maximum_N[latent]), options.window) for row in chosen]
            known = f"Annotations it agrees with: {', '.join(concepts[latent])}.\n" if latent in concepts else ""
            answer = json.dumps({"latent": latent, "description": "..."})
            text = f"{_TASK}{answer}\n{known}" + "\n".join(lines)
            yield (json.dumps({"latent": latent, "prompt": text}) + "\n").encode()


def _by_number(table: pa.Table) -> dict[int, dict[str, Any]]:
    return {row["protein"]: row for row in table.select(["protein", "header", "sequence"]).to_pylist()}


def _chosen(rows: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """The strongest, then as many random ones, of all bands in turn."""
    top = [row for row in rows if row["kind"] == "top"][:number]
    others = sorted((row for row in rows if row["kind"] == "random"), key=lambda row: (row["rank"], -row["band"]))
    return top + others[:number]


def _line(row: Mapping[str, Any], protein: Mapping[str, Any], maximum: float, window: int) -> str:
    """`AC[3]DE[10]FG (header)`: the residues around the example."""
    first, last = max(1, row["position"] - window), min(len(protein["sequence"]), row["position"] + window)
    strength = {
        position: max(1, min(STEPS, round(STEPS * value / maximum)))
        for position, value in zip(row["positions"], row["activations"], strict=True)
        if first <= position <= last
    }
    letters = (
        letter + (f"[{strength[place]}]" if place in strength else "")
        for place, letter in enumerate(protein["sequence"][first - 1 : last], first)
    )
    header = "".join(c for c in protein["header"] if c.isprintable())[:120]
    return f"{''.join(letters)} ({header})"


def _answers(job: Job, options: Describe, asked: Questions) -> dict[str, Any]:
    """Columns `latent`, `description`, and its two scores, of all latents that have any."""
    descriptions: dict[int, str] = {}
    if options.descriptions is not None:
        for latent, text in _read(job, options.descriptions, "latent", int, "description", str):
            if not 0 <= latent < job.num_latents:
                raise UserError(
                    f"{options.descriptions} describes latent {latent}, the dictionary has 0 to {job.num_latents - 1}",
                    "is it of another run?",
                )
            descriptions[latent] = text
    scores: dict[int, tuple[float | None, float | None]] = {}
    if options.predictions is not None:
        place = {name: number for number, name in enumerate(_names(asked))}
        predicted_Q = np.full(len(place), np.nan)
        for name, value in _read(job, options.predictions, "example", str, "activation", (int, float)):
            if name not in place:
                raise UserError(
                    f"{options.predictions} predicts example {name!r}, which is none of describe/scoring.jsonl",
                    "are they predictions for another run, or other options of describe?",
                )
            predicted_Q[place[name]] = value
        told = np.isfinite(predicted_Q)
        scores = correlations(asked.latent_Q[told], predicted_Q[told], asked.truth_Q[told])
    names = sorted(descriptions | scores)
    return {
        "latent": pa.array(names, pa.int64()),
        "description": pa.array([descriptions.get(name) for name in names], pa.string()),
        "description_pearson": pa.array([scores.get(name, (None, None))[0] for name in names], pa.float32()),
        "description_spearman": pa.array([scores.get(name, (None, None))[1] for name in names], pa.float32()),
    }


def _read(job: Job, path: str, key: str, key_type: Any, value: str, value_type: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs of a JSONL file; of equal keys the last counts.

    Raises:
        UserError: a line is no such object.
    """
    text = job.scope.store.read(path).decode("utf-8", "replace")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            good = isinstance(row[key], key_type) and isinstance(row[value], value_type)
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise UserError(
                f'{path}, line {number} is not {{"{key}": ..., "{value}": ...}}: {line[:80]}', "write one object a line"
            )
        yield row[key], row[value]
