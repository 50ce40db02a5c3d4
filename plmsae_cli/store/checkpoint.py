"""Checkpoints: logical tensors in ranges, one safetensors file a rank, committed by one small JSON.

`checkpoints/step-00001000/rank-0.safetensors` holds this rank's range of every tensor; `CHECKPOINT.json`, written
last, lists the files with sizes and hashes, the ranges, the plain state and its own hash. Any number of ranks can read
what any other number wrote.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.faults import fault
from plmsae_cli.store.fs import Store
from plmsae_cli.store.tensorfile import TensorFile, write_tensors

COMMIT = "CHECKPOINT.json"


@dataclass(frozen=True)
class Part:
    """Rows of a tensor of which each rank holds some: those from `first` on, of `length` over all ranks."""

    rows: torch.Tensor
    first: int
    length: int


@dataclass(frozen=True)
class Checkpoint:
    """A whole training state; on a rank that saves it, of some tensors a `Part`."""

    step: int
    tensors: Mapping[str, torch.Tensor | Part]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Restored:
    """What a checkpoint holds, put together from the ranges of all ranks."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]


def _range(length: int, rank: int, world: int) -> tuple[int, int]:
    return length * rank // world, length * (rank + 1) // world


def save(
    folder: Path,
    checkpoint: Checkpoint,
    keep: int,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> None:
    """Write this rank's range; rank 0 commits and drops all but the newest `keep`.

    Every rank calls this at the same step with tensors of the same names: whole ones, or its parts.
    """
    store = Store()
    target = folder / f"step-{checkpoint.step:08d}"
    ranges: dict[str, list[int]] = {}
    mine: dict[str, torch.Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        if isinstance(tensor, Part):
            ranges[name] = [tensor.first, tensor.first + len(tensor.rows), tensor.length]
            mine[name] = tensor.rows.detach().cpu().contiguous()
            continue
        if tensor.ndim == 0:
            if rank == 0:
                mine[name] = tensor.detach().cpu()
            continue
        start, stop = _range(tensor.shape[0], rank, world)
        ranges[name] = [start, stop, tensor.shape[0]]
        mine[name] = tensor.detach()[start:stop].cpu().contiguous()
    record = write_tensors(store, str(target / f"rank-{rank}.safetensors"), mine)
    body = {"size": record.size, "xxh3": record.xxh3, "ranges": ranges}
    store.write(str(target / f"rank-{rank}.json"), [json.dumps(body).encode()])
    fault("checkpoint.before-commit")
    barrier()
    if rank == 0:
        ranks = [json.loads((target / f"rank-{r}.json").read_text()) for r in range(world)]
        commit = {"step": checkpoint.step, "world": world, "ranks": ranks, "state": dict(checkpoint.state)}
        store.write(str(target / COMMIT), [json.dumps({"commit": commit, "xxh3": _digest(commit)}).encode()])
        fault("checkpoint.before-rotation")
        _rotate(folder, target, keep)
    barrier()


def _digest(commit: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(commit, sort_keys=True).encode())


def _rotate(folder: Path, saved: Path, keep: int) -> None:
    """Drop all but the newest `keep` up to the one just saved, and those beyond: they were passed over as damaged, and would be
    counted among the kept."""
    committed = sorted(path.parent for path in folder.glob(f"step-*/{COMMIT}"))
    beyond = [path for path in committed if path > saved]
    committed = committed[: len(committed) - len(beyond)]
    for old in [*committed[:-keep], *beyond]:
        (old / COMMIT).unlink()  # from here on it is no checkpoint, whatever interrupts the rest
        fault("checkpoint.in-rotation")
        _remove(old)
    for stray in folder.glob("step-*"):
        if stray < saved and not (stray / COMMIT).exists():
            _remove(stray)


def _remove(folder: Path) -> None:
    # NFS keeps a file that somebody on this machine reads (`verify`), and so its folder: the next rotation tries again.
    shutil.rmtree(folder, ignore_errors=True)


def load_newest(folder: Path, say: Callable[[str], None] | None = None) -> Restored | None:
    """The newest checkpoint that verifies; damaged ones are passed over, and said to be.

    Raises:
        UserError: there are checkpoints, and none of them verifies.
    """
    tell = say or (lambda text: print(text, file=sys.stderr, flush=True))
    paths = sorted(folder.glob(f"step-*/{COMMIT}"), reverse=True)
    problems = []
    for path in paths:
        try:
            return _load(path)
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{path.parent}: {error}")
            tell(f"checkpoint {path.parent.name} is damaged ({error}); trying the one before")
    if problems:
        raise UserError(
            "no checkpoint of this run can be read:\n  " + "\n  ".join(problems),
            "pass --restart to archive the run and begin again",
        )
    return None


def load_step(folder: Path, step: int) -> Restored:
    """The checkpoint of a step. Raises OSError or ValueError where it is not there or does not verify."""
    return _load(folder / f"step-{step:08d}" / COMMIT)


def _load(path: Path) -> Restored:
    body = json.loads(path.read_text())
    commit = body["commit"]
    if _digest(commit) != body["xxh3"]:
        raise ValueError(f"{COMMIT} does not have its own hash")
    store = Store()
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for rank, piece in enumerate(commit["ranks"]):
        name = path.parent / f"rank-{rank}.safetensors"
        data = name.read_bytes()
        if len(data) != piece["size"] or xxhash.xxh3_128_hexdigest(data) != piece["xxh3"]:
            raise ValueError(f"{name.name} does not have the recorded size and hash")
        file = TensorFile(store, str(name))
        for key in file.names():
            start = piece["ranges"][key][0] if key in piece["ranges"] else 0
            pieces.setdefault(key, []).append((start, file.read(key)))
    tensors = {}
    for key, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        tensors[key] = parts[0][1] if len(parts) == 1 else torch.cat([part for _, part in parts])
    return Restored(commit["step"], tensors, commit["state"])
