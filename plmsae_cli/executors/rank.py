"""Being one rank of a gang, whoever started it: torchrun, SLURM or Ray.

A rank reads what to do from `logs/gang.json` of the run, writes its output to `logs/rank-N.log`, gives a sign of life every
second (`logs/alive-rank-N`), and leaves what it failed with in `logs/error-rank-N.json`. The first tells how far it is in
`logs/gang-status.json`.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.worker import LocalContext, run_task
from plmsae_cli.runtime.device import allow_gpus
from plmsae_cli.runtime.processes import go_with_parent
from plmsae_cli.runtime.run_folder import RunFolder, read_json, write_json
from plmsae_cli.runtime.stop import FORCED, STOP
from plmsae_cli.runtime.system_errors import as_user_error
from plmsae_cli.runtime.task import Interrupted, Task

PARENT = "PLMSAE_PARENT_PID"
START = "PLMSAE_START"
ORDER = "gang.json"
ORDER_EVERY_S = 10
"""Between two looks at whether the order still stands."""


def be_rank(run: RunFolder) -> None:
    """The work of this rank; leaves with 75 where it was interrupted, and with 1 after an error."""
    logs = run.path / "logs"
    rank = int(os.environ.get("RANK", "0"))
    _write_to(logs / f"rank-{rank}.log")
    sign = logs / f"alive-rank-{rank}"
    start = os.environ.get(START)
    _leave_if_followed(logs / ORDER, start)
    order: dict[str, Any] = json.loads((logs / ORDER).read_text(encoding="utf-8"))
    _live(sign, start)
    experiment = Experiment.model_validate(order["experiment"])
    if experiment.launch.gpus == 0:
        allow_gpus([])
    try:
        with STOP.watching(run.stop_file):
            if order["task"] is None:
                _train_whole(experiment, order["text"], _Teller(logs, rank))
            else:
                context = LocalContext(experiment, _Teller(logs, rank).update)
                run_task(Task.from_json(order["task"]), context, commit=rank == 0)
    except Interrupted:
        sign.unlink(missing_ok=True)
        if rank == 0:
            write_json(logs / "gang-status.json", {"state": "interrupted"})
        sys.exit(75)
    except Exception as error:
        words = as_user_error(error)
        body = {
            "rank": rank,
            "time": time.time(),
            "user": words is not None,
            "message": words.message if words is not None else f"{type(error).__name__}: {error}",
            "hint": words.hint if words is not None else None,
            "trace": traceback.format_exc(),
        }
        write_json(logs / f"error-rank-{rank}.json", body)
        print(body["trace"], file=sys.stderr, flush=True)
        os._exit(1)  # the others wait in a collective; leaving at once lets the launcher end them
    sign.unlink(missing_ok=True)


def _train_whole(experiment: Experiment, text: str | None, teller: _Teller) -> None:
    """Of a gang on several machines the first rank does what else belongs to a run: its lock, status and report."""
    from plmsae_cli.executors.pipeline import run_experiment

    run_experiment(experiment, ["train"], teller, text)


class _Teller:
    """A reporter for those who look into the run's folder."""

    def __init__(self, logs: Path, rank: int) -> None:
        self._path, self._rank = logs / "gang-status.json", rank
        self._last = 0.0
        self._body: dict[str, Any] = {"done": 0.0, "total": 1.0, "figures": {}, "notes": []}

    def begin(self, title: str) -> None: ...

    def end(self, text: str) -> None: ...

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def update(self, done: float | None, total: float | None, note: str | None = None, **figures: Any) -> None:
        self._body["notes"] += [] if note is None else [note]
        if done is not None:
            self._body |= {"done": done, "total": total, "figures": figures}
        if self._rank == 0 and (note is not None or time.monotonic() - self._last > 0.5):
            self._last = time.monotonic()
            write_json(self._path, self._body)


def _write_to(log: Path) -> None:
    """What this process prints goes to the end of its own file."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    print(f"output: {log}", flush=True)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


def _live(sign: Path, start: str | None) -> None:
    """Give signs of life; leave when whoever started this rank is gone, so that no orphan is left behind, or another start of the
    run has begun.
    """
    write_json(sign, {"pid": os.getpid(), "host": socket.gethostname()})
    parent, launcher = os.getppid(), int(os.environ.get(PARENT, "0"))
    if launcher:
        go_with_parent()

    def live() -> None:
        for second in itertools.count():
            if launcher and not (os.getppid() == parent and _exists(launcher)):
                break
            if second % ORDER_EVERY_S == 0:
                _leave_if_followed(sign.with_name(ORDER), start)
            with suppress(OSError):  # it has done its work, or a network disk stumbles
                os.utime(sign)
            time.sleep(1)
        os._exit(FORCED)

    threading.Thread(target=live, daemon=True).start()


def _leave_if_followed(order: Path, start: str | None) -> None:
    """Leave where the order of the run's ranks is another start's, or gone with the run's folder: on a cluster ranks outlive a
    command that is killed, or begin only then, and must not write beside those of the next.

    Args:
        start: that of this rank; None: nobody says.
    """
    try:
        followed = start is not None and (read_json(order) or {}).get("start") != start
    except (OSError, UserError):  # a network disk that stumbles says nothing
        return
    if followed:
        print("another start of this run has begun, or its folder was moved: leaving", file=sys.stderr, flush=True)
        os._exit(FORCED)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def far_rank(run: str, folder: str, environment: Mapping[str, str]) -> None:
    """A rank that a cluster has started: `environment` says which of whom, `folder` where the command was started."""
    os.environ.update(environment)
    os.chdir(folder)
    STOP.listen(signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    be_rank(RunFolder(run))


def main() -> None:
    """A rank that torchrun has started."""
    STOP.install(quiet=True)
    be_rank(RunFolder(sys.argv[1]))


if __name__ == "__main__":
    main()
