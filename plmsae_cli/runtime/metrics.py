"""metrics.jsonl is the truth; Weights & Biases is a mirror that may fail without anybody losing anything."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from plmsae_cli.config.errors import UserError, first_line
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.runtime.run_folder import write_text

INIT_TIMEOUT_S = 30.0
"""How long a run waits for W&B to know it."""


class Sink(Protocol):
    """Where a line of metrics goes."""

    def add(self, line: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class NoSink:
    """Nowhere: ranks other than the first, W&B switched off."""

    def add(self, line: Mapping[str, Any]) -> None:
        return

    def close(self) -> None:
        return


class MetricsFile:
    """Appends JSON lines; on resume, lines after the checkpoint's step are cut, so that no step appears twice."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        kept = [line for line in _lines(path) if line.get("step", math.inf) <= step]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def add(self, line: Mapping[str, Any]) -> None:
        """Raises UserError where the file was deleted or moved meanwhile: further lines would reach nobody."""
        if not self._path.exists():
            raise UserError(
                f"{self._path} is gone: its run was deleted or moved while it was training",
                "end a run before you move its folder; the same command begins a deleted one anew",
            )
        # JSON has no NaN; a reader must not choke on the line that says what went wrong.
        self._file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [line for text in path.read_bytes().splitlines() if (line := metrics_line(text)) is not None]


def metrics_line(text: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None where it is not whole: a crash may have cut it short, or left zeros in its place."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def start_wandb(experiment: Experiment, folder: Path, **more: Any) -> Any:
    """The W&B run of a run folder, begun or continued. Raises whatever goes wrong."""
    import wandb

    options = experiment.wandb
    os.environ.setdefault("WANDB_SILENT", "true")
    # A network that died must not hold a finished run; what was not sent stays on disk for `wandb sync`.
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
    return wandb.init(
        project=options.project,
        entity=options.entity,
        group=options.group,
        name=experiment.name,
        id=_run_id(folder),
        resume="allow",
        mode=options.mode if options.mode != "off" else "disabled",
        dir=str(folder),
        config=experiment.dump(),
        # SAEs that train together each have a run of their own: by default the second would be given the first's.
        settings=wandb.Settings(save_code=False, disable_git=True, init_timeout=INIT_TIMEOUT_S, reinit="create_new"),
        **more,
    )


class WandbSink:
    """Mirrors lines to W&B; the first failure is told once, and ends the mirroring, never the run."""

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        self._run: Any = None
        self._files: Path | None = None
        try:
            self._run = start_wandb(experiment, folder)
            self._files = Path(self._run.dir).parent
        except Exception as error:
            self._give_up(error)

    def add(self, line: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(flat(line), step=int(line["step"]))
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        if self._run is None:
            return
        try:
            offline = self._run.settings._offline
            self._run.finish()
            if offline:
                print(f"W&B files are on disk; upload them with: wandb sync {self._files}", file=sys.stderr)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        later = "" if self._files is None else f"; what it has: wandb sync {self._files}"
        why = f"{type(error).__name__}: {first_line(error)}"
        print(f"W&B stopped ({why}); metrics.jsonl goes on{later}", file=sys.stderr, flush=True)


def _run_id(folder: Path) -> str:
    """The same W&B run after a resume."""
    path = folder / "wandb-id"
    if not path.exists():
        write_text(path, os.urandom(6).hex())
    return path.read_text().strip()


def flat(line: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by slashes: `valid/random/loss`."""
    found: dict[str, Any] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        else:
            found[f"{prefix}{key}"] = value
    return found


def open_sinks(experiment: Experiment, folder: Path, step: int, first_rank: bool) -> list[Sink]:
    """metrics.jsonl, and W&B if wanted, on the first rank; nothing elsewhere."""
    if not first_rank:
        return [NoSink()]
    sinks: list[Sink] = [MetricsFile(folder / "metrics.jsonl", step)]
    if experiment.wandb.mode != "off":
        sinks.append(WandbSink(experiment, folder))
    return sinks
