"""What a plan foretold of a stage, kept beside the run so that it can be compared with what came."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plmsae_cli.runtime.run_folder import read_json, write_json

FILE = "predicted.json"
PEAK = "logs/memory-rank-0.json"


def foretell(run: Path, stage: str, figures: Mapping[str, Any], gpus: int, gpu_hour: float | None) -> None:
    """Keep the time and the memory that the plan of a stage predicts, where it does.

    Args:
        gpu_hour: dollars for an hour of a GPU.
    """
    seconds = 3600 * float(figures["hours"]) if "hours" in figures else figures.get("predicted_seconds")
    body = {"gpus": gpus, "gpu_hour": gpu_hour}
    body |= {} if seconds is None else {"seconds": seconds}
    body |= {"memory": figures["memory_per_rank"]} if gpus and "memory_per_rank" in figures else {}
    if len(body) > 2:
        write_json(run / FILE, {**(read_json(run / FILE) or {}), stage: body})


def keep_peak(run: Path, rank: int) -> None:
    """Keep the most memory that training took on this rank's GPU."""
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        write_json(run / f"logs/memory-rank-{rank}.json", {"bytes": torch.cuda.max_memory_allocated()})


def compared(run: Path, stage_seconds: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Stage -> what was `predicted` and what was `measured`, of the stages that have both."""
    found = {}
    for stage, body in (read_json(run / FILE) or {}).items():
        if stage not in stage_seconds:
            continue
        predicted = {name: body[name] for name in ("seconds", "memory") if name in body}
        measured: dict[str, float] = {"seconds": stage_seconds[stage]}
        if "memory" in body and (peak := read_json(run / PEAK)) is not None:
            measured["memory"] = peak["bytes"]
        for each in (predicted, measured):
            if body["gpus"] and body["gpu_hour"] is not None and "seconds" in each:
                each["usd"] = each["seconds"] / 3600 * body["gpus"] * body["gpu_hour"]
        found[stage] = {"predicted": predicted, "measured": measured}
    return found
