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
    if len(body) > 2 or (gpus and gpu_hour is not None):
        write_json(run / FILE, {**(read_json(run / FILE) or {}), stage: body})


def keep_peak(run: Path, rank: int) -> None:
    """Keep the most memory that training took on this rank's GPU."""
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        write_json(run / f"logs/memory-rank-{rank}.json", {"bytes": torch.cuda.max_memory_allocated()})


def dollars_a_second(gpus: int, gpu_hour: float | None) -> float | None:
    """What so many GPUs cost; None where there are none, or no price was set."""
    return gpus * gpu_hour / 3600 if gpus and gpu_hour is not None else None


def cost(run: Path, stage_seconds: Mapping[str, float]) -> float | None:
    """Dollars that the GPUs of a run have come to, over all its stages and starts; None where no price was set."""
    found = read_json(run / FILE) or {}
    rates = {s: dollars_a_second(body["gpus"], body["gpu_hour"]) for s, body in found.items() if s in stage_seconds}
    spent = [stage_seconds[stage] * rate for stage, rate in rates.items() if rate is not None]
    return sum(spent) if spent else None


def compared(run: Path, stage_seconds: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Stage -> what was `predicted` and what was `measured`, of the stages that have both."""
    found = {}
    for stage, body in (read_json(run / FILE) or {}).items():
        predicted = {name: body[name] for name in ("seconds", "memory") if name in body}
        if stage not in stage_seconds or not predicted:
            continue
        measured: dict[str, float] = {"seconds": stage_seconds[stage]}
        if "memory" in body and (peak := read_json(run / PEAK)) is not None:
            measured["memory"] = peak["bytes"]
        for each in (predicted, measured):
            if (rate := dollars_a_second(body["gpus"], body["gpu_hour"])) is not None and "seconds" in each:
                each["usd"] = each["seconds"] * rate
        found[stage] = {"predicted": predicted, "measured": measured}
    return found
