"""The lines of `results.jsonl`: what all lines of a run share, and how they are added."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def stamp(run: str, device: str, command: str) -> dict[str, str]:
    """Run (with the time), device, date, commit (empty outside a repository) and command."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, text=True, capture_output=True, check=False)
    return {
        "run": time.strftime(f"{run}-%Y%m%dT%H%M%S"),
        "device": f"{device}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": head.stdout.strip(),
        "command": command,
    }


def cpu(threads: int) -> str:
    """This machine's processor, and how many threads of it."""
    name = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].splitlines()[0]
    return f"{name}, {threads} threads"


def busy() -> str:
    """A note on what else the machine does, where that is more than its cores can take along; else empty."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    return f"beside other work, load {load:.0f} on {cores} cores" if load > 2 * cores else ""


def add(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append the lines to the file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
