"""What a machine must have for any experiment: room, a bucket that answers, GPUs that compute. One check, one line."""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.runtime.device import DRIVER_SECONDS
from plmsae_cli.store.fs import Store

ROOM = 1 << 30
"""Bytes below which a disk counts as full."""
GPU_SECONDS = 120
_COMPUTE = "import torch; [torch.ones(8, device=f'cuda:{i}').sum().item() for i in range(torch.cuda.device_count())]"


State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    state: State
    text: str
    remedy: str | None = None


def nearest(place: Path) -> Path:
    """The place itself, or what exists of the path to it."""
    return next(p for p in (place, *place.absolute().parents) if p.exists())


def folders(experiment: Experiment) -> dict[str, str]:
    """Field -> place, of the two that are written to."""
    return {"root": experiment.root, "data_root": experiment.data_folder()}


def space(name: str, place: str, room: int = ROOM) -> Check:
    """Free bytes of the disk that a local folder is, or would be, on."""
    existing = nearest(Path(place))
    free = shutil.disk_usage(existing).free
    text = f"{existing}: {free / 1e9:,.1f} GB free"
    if free >= room:
        return Check(name, "ok", text)
    return Check(
        name, "fail", f"the disk is full: {text}", "free some space, or name another disk in root or data_root"
    )


def bucket(experiment: Experiment, place: str, write: bool) -> Check:
    """A bucket that answers; with `write`, a small object is written, read and deleted."""
    name, store = f"bucket {place}", Store(experiment.storage)
    try:
        store.probe(place, write)
        if not write:
            return Check(name, "ok", "answers")
        path = f"{place}/.doctor-{secrets.token_hex(4)}.tmp"
        store.write(path, [b"plmsae"])
        came = store.read(path)
        store.delete(path)
    except UserError as error:
        return Check(name, "fail", error.message, error.hint)
    if came != b"plmsae":
        return Check(name, "fail", "an object came back with another content", "check the server")
    return Check(name, "ok", "an object was written, read and deleted")


def gpus_compute() -> Check:
    """Every visible GPU adds eight numbers, in a process of its own: one that met a dead GPU cannot use the others either."""
    command = [sys.executable, "-c", _COMPUTE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GPU_SECONDS, check=False)
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1] if done.returncode else None
    except subprocess.TimeoutExpired:
        why = f"no answer in {GPU_SECONDS} s"
    if why is None:
        return Check("GPUs", "ok", "all compute")
    return Check("GPUs", "fail", f"a GPU does not compute: {why}", "look at nvidia-smi and dmesg; restart the machine")


def driver() -> tuple[str, list[str]] | None:
    """The NVIDIA driver's version and the names of its GPUs; None where there is no driver, or it does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=DRIVER_SECONDS, check=False)
    except (subprocess.TimeoutExpired, OSError):  # a dead GPU can hang it
        return None
    rows = re.findall(r"^(\S+), (.+)$", answer.stdout, re.MULTILINE) if answer.returncode == 0 else []
    return (rows[0][0], [name for _, name in rows]) if rows else None
