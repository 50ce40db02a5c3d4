"""A gang as its launcher sees it, by what its ranks leave in the run's folder; see `rank`.

Launchers of other people's making turn every exit code into 1, and ranks may be on other machines: files are the truth.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.rank import ORDER, START
from plmsae_cli.runtime.run_folder import RunFolder, read_json, write_json
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted, Task, TaskFailed

LOOK_S = 0.2
WAKE_S = 3.0
IN_THE_WAKE = (
    "Connection reset by peer", "Connection closed by peer", "Broken pipe", "Timed out waiting", "NCCL", "DistBackendError",
    "DistNetworkError", "DistStoreError",
)  # fmt: skip
"""Words of an error that a rank meets when another one has gone."""


class Gang:
    """The order given to ranks, and what they tell. `start` belongs into the environment of each: which start it is.

    Args:
        task: what they work on together; None: all that `plmsae train` does.
    """

    def __init__(
        self,
        run: RunFolder,
        task: Task | None,
        experiment: Experiment,
        report: Callable[..., None],
        text: str | None = None,
    ) -> None:
        self.run, self.name, self.logs = run, "train" if task is None else task.id, run.path / "logs"
        self._folders = [str(run.path)] if task is None else list(task.folders)
        self._report, self._patience = report, experiment.launch.patience
        self.logs.mkdir(parents=True, exist_ok=True)
        for old in ("gang-status.json", "error-rank-*.json", "alive-rank-*"):
            for path in self.logs.glob(old):
                path.unlink(missing_ok=True)
        # Of several machines each one's command writes the order, the same one.
        self.start = {} if task is None else {START: secrets.token_hex(8)}
        body = {"task": None if task is None else task.to_json(), "experiment": experiment.dump(), "text": text}
        write_json(self.logs / ORDER, {**body, "start": self.start.get(START)})
        self._asked, self._told = False, 0
        self._signs: dict[str, tuple[int, float]] = {}

    def waits(self, what: str | None) -> None:
        """Say what the ranks wait for before they can begin, here and in status.json; None: they need not any more."""
        if what is not None:
            self._report(None, None, note=what)
        for folder in self._folders:
            RunFolder(folder).status(waiting=what)

    def look(self) -> None:
        """Pass on how far it is, and a wish to stop.

        Raises:
            TaskFailed: a rank has given no sign of life for too long.
        """
        state = self._status()
        if "done" in state:
            for note in state["notes"][self._told :]:
                self._report(state["done"], state["total"], note=note)
            self._told = len(state["notes"])
            self._report(state["done"], state["total"], **state["figures"])
        if STOP.requested() and not self._asked:
            self._asked = True
            self.run.stop_file.touch()  # launchers kill ranks soon after a signal; a file is not in haste
        if (silent := self._silent()) is not None:
            raise silent

    def _silent(self) -> TaskFailed | None:
        """By when a sign was seen to change: the clocks of other machines may be off."""
        now = time.monotonic()
        for sign in self.logs.glob("alive-rank-*"):
            try:
                changed = sign.stat().st_mtime_ns
            except FileNotFoundError:
                continue
            seen, since = self._signs.get(sign.name, (0, now))
            if changed != seen:
                self._signs[sign.name] = (changed, now)
            elif now - since > self._patience:
                who, rank = read_json(sign) or {}, sign.name.rpartition("-")[2]
                return TaskFailed(
                    self.name,
                    f"rank {rank} (pid {who.get('pid')} on {who.get('host')}) gave no sign of life for {self._patience} s "
                    f"(launch.patience); the others were ended. Its output is in {self.logs}/rank-{rank}.log",
                    lost=True,
                )
        return None

    def _status(self) -> dict[str, Any]:
        return read_json(self.logs / "gang-status.json") or {}

    @property
    def begun(self) -> bool:
        """Whether any rank has given a sign of life, and not yet said that it has done its work."""
        return any(self.logs.glob("alive-rank-*"))

    @property
    def failed(self) -> bool:
        """Whether a rank has left an error."""
        return any(self.logs.glob("error-rank-*.json"))

    def failed_by_itself(self) -> bool:
        """Whether a rank has left an error that is not about another one's going away; some seconds are given to find it."""
        first = self._first_error()
        return first is not None and not _in_the_wake(first)

    @property
    def interrupted(self) -> bool:
        """Whether the ranks have stopped at a checkpoint."""
        return self._status().get("state") == "interrupted"

    def _first_error(self) -> dict[str, Any] | None:
        """The earliest that is not about another rank's going away; one that is, if a while brings no better."""
        end = time.monotonic() + WAKE_S
        while True:
            found = [body for file in self.logs.glob("error-rank-*.json") if (body := read_json(file)) is not None]
            found.sort(key=lambda body: (_in_the_wake(body), body["time"]))
            first = found[0] if found else None
            if first is None or not _in_the_wake(first) or time.monotonic() > end:
                return first
            time.sleep(LOOK_S)

    def end(self, otherwise: Exception, killed: Exception | None = None) -> None:
        """After an end that was no success.

        Args:
            otherwise: what to raise where no rank has said why.
            killed: what to raise rather than what ranks say: when one is killed, the others fail in its wake.

        Raises:
            Interrupted: the ranks stopped at a checkpoint.
            UserError, TaskFailed: the earliest error that a rank left behind.
        """
        if self.interrupted:
            raise Interrupted
        if killed is not None:
            raise killed
        first = self._first_error()
        if first is None:
            raise otherwise
        if first["user"]:
            raise UserError(first["message"], first["hint"])
        raise TaskFailed(self.name, f"rank {first['rank']}: {first['message']}", first["trace"])


def _in_the_wake(error: Mapping[str, Any]) -> bool:
    return any(words in error["message"] for words in IN_THE_WAKE)
