"""`logs`: what a run has said."""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path

from plmsae_cli.cli.exits import DONE, INTERRUPTED, checked

LOOK_S = 0.5


def show_logs(run: Path, follow: bool, rank: int | None, lines: int) -> int:
    """The end of a log, and with `follow` what is added until the run ends."""

    def work() -> int:
        from plmsae_cli.config.errors import UserError
        from plmsae_cli.runtime.run_folder import find_run, read_json

        folder = find_run(run)
        logs = folder / "logs"
        path = logs / ("run.log" if rank is None else f"rank-{rank}.log")
        if not path.exists():
            there = sorted(each.name for each in logs.glob("*.log")) if logs.is_dir() else []
            raise UserError(
                f"{path} is not there", f"logs of this run: {', '.join(there) or 'none'}; ranks are counted from 0"
            )
        with path.open(encoding="utf-8", errors="replace") as file:
            _pass_on("".join(deque(file, lines)))
            try:
                while follow and running(read_json(folder / "status.json") or {}):
                    _pass_on(file.read())
                    time.sleep(LOOK_S)
            except KeyboardInterrupt:
                return INTERRUPTED
            _pass_on(file.read() if follow else "")
        if follow:
            print(f"({_how_it_ended(folder)})", file=sys.stderr)
        others = sorted(each.name for each in logs.glob("rank-*.log"))
        if rank is None and others:
            print(f"({len(others)} rank(s) have logs of their own: --rank 0 to {len(others) - 1})", file=sys.stderr)
        return DONE

    return checked(work)


def running(status: dict[str, object]) -> bool:
    from plmsae_cli.runtime.processes import live_state

    return live_state(status) == "running"


def _how_it_ended(folder: Path) -> str:
    from plmsae_cli.runtime.processes import live_state
    from plmsae_cli.runtime.run_folder import read_json

    status = read_json(folder / "status.json")
    return f"{folder} was deleted or moved" if status is None else f"{folder}: {live_state(status)}"


def _pass_on(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
