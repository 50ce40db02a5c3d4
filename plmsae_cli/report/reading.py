"""What a run folder holds, read once: every part but the configuration may be absent."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from plmsae_cli.config.errors import UserError
from plmsae_cli.runtime.run_folder import read_json, read_pointers

Line = dict[str, Any]

STAGE_ORDER = ("embed", "shuffle", "optimize", "train", "sweep", "eval")
_LATENT_COLUMNS = ("latent", "density", "max", "mean_active", "dead")
_EXAMPLE_COLUMNS = ("top_protein", "top_residue", "top_context", "top_context_offset")


@dataclass(frozen=True)
class Latents:
    """eval/latents.parquet, one entry a latent in each array (length N).

    density: share of held-out residues on which the latent fires, 0 to 1. max, mean_active: activations in
    the units of the dictionary. dead: bool. examples: the columns top_protein, top_residue (1-based
    position), top_context (the residues around it) and top_context_offset (where in them it is, counted from
    0), those that there are, as lists of N values or None.
    """

    latent: np.ndarray
    density: np.ndarray
    max: np.ndarray
    mean_active: np.ndarray
    dead: np.ndarray
    examples: dict[str, list[Any]]


@dataclass(frozen=True)
class Run:
    """One run folder. Absent files leave empty containers and None."""

    folder: Path
    config: dict[str, Any]
    yaml: str
    environment: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    sae: list[Line] = field(default_factory=list)
    plm: list[Line] = field(default_factory=list)
    valid: list[Line] = field(default_factory=list)
    dictionary: dict[str, Any] = field(default_factory=dict)
    """sae/sae.json: what the trained dictionary says of itself."""
    scores: dict[str, Any] | None = None

    @cached_property
    def latents(self) -> Latents | None:
        """eval/latents.parquet, read when it is first asked for: tables of many runs do without.

        Raises UserError where it is damaged.
        """
        return _latents(self.folder / "eval" / "latents.parquet")

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.name)

    @property
    def demo(self) -> bool:
        """Whether the language model is the bundled one, whose features mean nothing."""
        if self.scores is not None:
            return bool(self.scores.get("demo"))
        return (self.dictionary.get("weights") or {}).get("name") == "bundled"

    @property
    def num_latents(self) -> int | None:
        """Width of the dictionary."""
        width = (self.scores or self.dictionary.get("config") or {}).get("num_latents")
        return None if width is None else int(width)

    @property
    def architecture(self) -> str | None:
        """Kind of the dictionary."""
        known = (self.scores or self.dictionary.get("config") or {}).get("architecture")
        kind = known or self.asked("train", "sae", "architecture")
        return None if kind is None else str(kind)

    @property
    def fidelity(self) -> dict[str, Any]:
        """The fidelity section of eval/metrics.json, or {}."""
        return (self.scores or {}).get("fidelity") or {}

    def asked(self, *path: str) -> Any:
        """A value of the configuration, or None where a section is missing."""
        value: Any = self.config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: no resolved.yaml there, or a file that is damaged; names it.
    """
    config, text = read_settings(folder)
    lines = _lines(folder / "metrics.jsonl")
    return Run(
        folder=folder,
        config=config,
        yaml=text,
        environment=read_json(folder / "environment.json") or {},
        artifacts=read_pointers(folder),
        stage_seconds=(read_json(folder / "status.json") or {}).get("stage_seconds") or {},
        sae=[line for line in lines if "fvu" in line],
        plm=[line for line in lines if "fvu" not in line and "loss" in line],
        valid=[line for line in lines if "valid" in line],
        dictionary=read_json(folder / "sae" / "sae.json") or {},
        scores=read_json(folder / "eval" / "metrics.json"),
    )


def read_settings(folder: Path) -> tuple[dict[str, Any], str]:
    """resolved.yaml of a run, as values and as text; raises as `read_run` does."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = folder / "resolved.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is not a run: it has no resolved.yaml", "name a folder under `root`")
    text = path.read_text(encoding="utf-8")
    try:
        return YAML(typ="safe", pure=True).load(text) or {}, text
    except YAMLError as error:
        raise UserError(f"{path} is damaged: {error}", "start the run again: it rewrites the file") from error


def _lines(path: Path) -> list[Line]:
    if not path.is_file():
        return []
    found: list[Line] = []
    rows = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, row in enumerate(rows, start=1):
        try:
            line = json.loads(row)
            if not isinstance(line, dict):
                raise ValueError("it holds no JSON object")
            found.append(line)
        except ValueError as error:
            # A run that was killed leaves its last line half written; it lost nothing that counts.
            if number < len(rows):
                raise UserError(f"{path}, line {number} is damaged: {error}", "remove the line") from error
    return found


def _latents(path: Path) -> Latents | None:
    if not path.is_file():
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        there = pq.read_schema(path).names
        if missing := [name for name in _LATENT_COLUMNS if name not in there]:
            raise UserError(f"{path} has no column {', '.join(missing)}", "run eval again")
        table = pq.read_table(path, columns=[name for name in (*_LATENT_COLUMNS, *_EXAMPLE_COLUMNS) if name in there])
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged: {error}", "run eval again") from error
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in _LATENT_COLUMNS}
    examples = {name: table[name].to_pylist() for name in _EXAMPLE_COLUMNS if name in table.column_names}
    return Latents(**columns, examples=examples)
