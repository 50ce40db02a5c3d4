"""Language-model runs side by side: how soon a loss was reached, how good the model became."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plmsae_cli.config.plm import raced
from plmsae_cli.runtime.run_folder import files_named, read_json

TARGET_LOSS = 2.1
"""Nats: what the speed track asks for where a run names no target of its own."""
TRACKS = ("speed", "quality")


@dataclass(frozen=True)
class Entry:
    """One run."""

    run: str
    parameters: int | None
    hardware: str
    seconds: float | None
    """Of training, without compiling, validating and saving: speed, to the target; quality, of the whole run."""
    cost: float | None
    """Of those seconds, by `price.gpu_hour`, in its currency."""
    loss: float
    """Of the validation that counts: speed, the first below the target; quality, the last (nats)."""
    representations: float | None
    """Mean score of the axis `representations`, where it was measured."""
    tokens: int
    commit: str | None

    def dump(self) -> dict[str, Any]:
        return asdict(self)


def leaderboard(root: Path, track: str) -> list[Entry]:
    """The runs below a folder, best first: `speed`, those that reached their target, by time; `quality`, all that were validated,
    by what their representations are worth where all have it measured, else by loss."""
    found = [
        entry for path in files_named(root, "metrics.jsonl") if (entry := _entry(path.parent, root, track)) is not None
    ]
    if track == "speed":
        return sorted(found, key=lambda entry: (entry.seconds is None, entry.seconds, entry.loss))
    if found and all(entry.representations is not None for entry in found):
        return sorted(found, key=lambda entry: (-(entry.representations or 0.0), entry.loss))
    return sorted(found, key=lambda entry: entry.loss)


def _entry(run: Path, root: Path, track: str) -> Entry | None:
    settings = _settings(run)
    plm = (settings.get("train") or {}).get("plm")
    lines = list(_lines(run / "metrics.jsonl"))
    scored = [line for line in lines if _loss(line) is not None]
    if plm is None or not scored:
        return None
    about = read_json(run / "plm" / "config.json")
    race = plm.get("speedrun") or {}
    at = scored[-1]
    if track == "speed":
        parameters = _parameters(run)
        most = race.get("max_parameters")
        target = race.get("target_loss", TARGET_LOSS)
        below = [line for line in scored if (loss := _loss(line)) is not None and loss < target]
        if not below or (most is not None and parameters is not None and parameters > most):
            return None
        at = below[0]
    loss = _loss(at)
    assert loss is not None
    seconds = _seconds(lines, at["step"], about)
    gpus = _ranks(run)
    price = (settings.get("price") or {}).get("gpu_hour")
    environment = read_json(run / "environment.json") or {}
    scores = (read_json(run / "eval" / "metrics.json") or {}).get("representations", {}).get("models", [])
    own = [model["score"] for model in scores if model["model"] == settings.get("name")]
    commit = environment.get("commit")
    return Entry(
        run=str(run.relative_to(root)),
        parameters=_parameters(run),
        hardware=f"{gpus} x {environment.get('device') or 'unknown'}",
        seconds=seconds,
        cost=None if price is None or seconds is None else round(price * gpus * seconds / 3600, 4),
        loss=loss,
        representations=own[0] if own else None,
        tokens=at["tokens"],
        commit=None if commit is None else commit[:12] + ("+" if environment.get("dirty") else ""),
    )


def _loss(line: dict[str, Any]) -> float | None:
    """The loss that counts of a line of metrics.jsonl; None where it has none that is finite."""
    valid = line.get("valid") or {}
    name = raced(valid)
    return None if name is None else valid[name]["loss"]


def _settings(run: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML

    path = run / "resolved.yaml"
    return (YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for row in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(row)
        except ValueError:
            return  # a run that was killed leaves its last line half written


def _seconds(lines: Sequence[dict[str, Any]], step: int, about: dict[str, Any] | None) -> float | None:
    """The training clock at a step: of the finished run, else of the last line before it that tells."""
    facts = (about or {}).get("facts", {})
    if facts.get("steps") == step and "train_seconds" in facts:
        return float(facts["train_seconds"])
    told = [line["train_seconds"] for line in lines if "train_seconds" in line and line["step"] <= step]
    return float(told[-1]) if told else None


def _parameters(run: Path) -> int | None:
    """Trained numbers of the saved model, by the header of its file."""
    from plmsae_cli.store.fs import Store
    from plmsae_cli.store.tensorfile import TensorFile

    path = run / "plm" / "model.safetensors"
    if not path.is_file():
        return None
    file = TensorFile(Store(), str(path))
    total = 0
    for name in file.names():
        count = 1
        for size in file.shape(name):
            count *= size
        total += count if name != "rotary.inv_freq" else 0
    return total


def _ranks(run: Path) -> int:
    """Ranks of the newest checkpoint."""
    newest = max((run / "checkpoints").glob("step-*/CHECKPOINT.json"), default=None)
    found = read_json(newest) if newest is not None else None
    return int(((found or {}).get("commit") or {}).get("world", 1))
