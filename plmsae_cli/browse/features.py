"""What a run has about its latents, read for pages: `eval/features`, and beside it what other axes found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plmsae_cli.config.errors import UserError

FORMAT = "plmsae.features/1"
STEPS = 1000
"""Activations are whole thousandths of the latent's maximum, which a screen cannot show finer."""
MOST_STEPS = 65_535
Row = dict[str, Any]


class Annotations:
    """Ranges of concepts in proteins: a few bytes each, of which there may be millions."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._protein_M = np.empty(0, dtype=np.int32)
        if not path.is_file():
            return
        table = pq.read_table(path, columns=["protein", "concept", "start", "stop"])
        order_M = np.argsort(table["protein"].to_numpy(), kind="stable")
        self._protein_M, self._start_M, self._stop_M = (
            table[name].to_numpy()[order_M] for name in ("protein", "start", "stop")
        )
        concept = table["concept"].combine_chunks().dictionary_encode()
        self._concept_M = concept.indices.to_numpy()[order_M]
        self._names = concept.dictionary.to_pylist()

    def of(self, protein: int) -> list[list[Any]]:
        """Concept, first and last residue (from 1) of each range of a protein, in the file's order."""
        first, last = np.searchsorted(self._protein_M, [protein, protein + 1])
        if first == last:
            return []
        columns = (column[first:last].tolist() for column in (self._concept_M, self._start_M, self._stop_M))
        return [[self._names[concept], start, stop] for concept, start, stop in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Features:
    """The features of one run; tables are columns of Python values, in order of the latents."""

    run: Path
    index: dict[str, Any]
    latents: dict[str, list[Any]]
    found: dict[str, list[Any]]
    """Columns of `eval/latents.parquet`: what other axes found; absent ones are absent."""
    proteins: dict[int, Row]
    annotations: Annotations
    steering: dict[str, Any] = field(default_factory=dict)
    """How latents were steered: `mode`, `residues`, `proteins`; empty where none was."""
    effects: dict[int, Row] = field(default_factory=dict)
    """Of a steered latent, at its largest strength: `strength`, and by amino acid `effect`, `direction`, `q`."""

    @property
    def num_latents(self) -> int:
        return int(self.index["num_latents"])

    def groups(self, random: int) -> Iterator[tuple[int, dict[int, list[Row]], dict[int, list[Row]]]]:
        """Number of a group of latents, their examples and their concepts, a group at a time.

        Of the random examples there are the first `random` of each band; `steps` stand for `activations`.
        """
        size = self.index["latents_per_group"]
        maximum_N = np.array(self.latents["max"], dtype=np.float64)
        rising = _streamed(self.run / "eval" / "features" / "concepts.parquet")
        ahead = next(rising, None)
        for number in range(self.index["groups"]):
            concepts = []
            while ahead is not None and ahead["latent"] < (number + 1) * size:
                concepts.append(ahead)
                ahead = next(rising, None)
            path = self.run / "eval" / "features" / "examples" / f"group-{number:05}.parquet"
            yield number, _by(_examples(path, random, maximum_N), "latent"), _by(concepts, "latent")


def read_features(run: Path) -> Features:
    """Everything but the examples.

    Raises:
        UserError: the run has no features, or they were written by another version.
    """
    folder = run / "eval" / "features"
    path = folder / "index.json"
    if not path.is_file():
        raise UserError(
            f"{run} has no features to show: it has no eval/features/index.json",
            "add `features: {}` to the eval section of its YAML and run `plmsae eval` again",
        )
    index = json.loads(path.read_text(encoding="utf-8"))
    if index.get("format") != FORMAT:
        raise UserError(f"{path}: format {index.get('format')!r} is not {FORMAT}", "was it written by a newer plmsae?")
    proteins = {row["protein"]: row for row in _rows(folder / "examples" / "proteins.parquet")}
    annotations = Annotations(folder / "examples" / "annotations.parquet")
    found = _columns(run / "eval" / "latents.parquet")
    steering, effects = _steering(run / "eval" / "steering", index["letters"])
    return Features(run, index, _columns(folder / "latents.parquet"), found, proteins, annotations, steering, effects)


def _steering(folder: Path, letters: str) -> tuple[dict[str, Any], dict[int, Row]]:
    """What the axis `steering` left: how, and each latent's effects on the amino acids."""
    path = folder / "result.json"
    if not path.is_file():
        return {}, {}
    body = json.loads(path.read_text(encoding="utf-8"))
    place = {letter: i for i, letter in enumerate(letters)}
    effects: dict[int, Row] = {}
    for row in _rows(folder / "effects.parquet"):
        if row["readout"] not in place:
            continue
        own = effects.get(row["latent"])
        if own is None or abs(row["strength"]) > abs(own["strength"]):
            own = {"strength": row["strength"], **{key: [0.0] * len(letters) for key in ("effect", "direction", "q")}}
            effects[row["latent"]] = own
        if row["strength"] == own["strength"]:
            for key in ("effect", "direction", "q"):
                own[key][place[row["readout"]]] = row[key]
    return {key: body[key] for key in ("mode", "residues", "proteins")}, effects


def _columns(path: Path) -> dict[str, list[Any]]:
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = pq.read_table(path).to_pydict() if path.is_file() else {}
    return columns


def _examples(path: Path, random: int, maximum_N: npt.NDArray[np.float64]) -> list[Row]:
    """Rows of a file of examples, those that are shown; `positions` and `steps` are arrays."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    table = table.filter(pc.or_(pc.equal(table["kind"], "top"), pc.less_equal(table["rank"], random)))
    positions, activations = (table[name].combine_chunks() for name in ("positions", "activations"))
    rows: list[Row] = table.drop_columns(["positions", "activations"]).to_pylist()
    maximum_A = np.repeat(maximum_N[table["latent"].to_numpy()], np.diff(activations.offsets.to_numpy()))
    steps_A = np.rint(activations.flatten().to_numpy() / maximum_A * STEPS).clip(1, MOST_STEPS)
    position_A = positions.flatten().to_numpy()
    ends = (positions.offsets.to_numpy() - positions.offsets[0].as_py()).tolist()
    for row, (start, stop) in zip(rows, pairwise(ends), strict=True):
        row["positions"], row["steps"] = position_A[start:stop], steps_A[start:stop]
    return rows


def _rows(path: Path) -> list[Row]:
    import pyarrow.parquet as pq

    rows: list[Row] = pq.read_table(path).to_pylist() if path.is_file() else []
    return rows


def _streamed(path: Path) -> Iterator[Row]:
    """Rows of a table that is ordered by latent and may be larger than memory."""
    import pyarrow.parquet as pq

    if path.is_file():
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=512):
                yield from batch.to_pylist()


def _by(rows: list[Row], key: str) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found
