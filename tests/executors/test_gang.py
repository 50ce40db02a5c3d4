"""Which rank failed, and why: read from what ranks and torchrun leave behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors import rank
from plmsae_cli.executors.gang import Gang
from plmsae_cli.executors.torchrun import _killed
from plmsae_cli.runtime.run_folder import RunFolder, write_json
from plmsae_cli.runtime.stop import FORCED
from plmsae_cli.runtime.task import Task, TaskFailed

TASK = Task("train", "train", ("run",))
KILLED = """
[0]:
  time      : 2026-01-01_00:00:00
  host      : host
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 17)
  error_file: <N/A>
[1]:
  time      : 2026-01-01_00:00:00
  host      : host
  rank      : 3 (local_rank: 1)
  exitcode  : {code} (pid: 18)
  error_file: <N/A>
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "torchrun.log").write_text(KILLED.format(code=-9))
    return RunFolder(tmp_path)


def error(run: RunFolder, rank: int, time: float, **body: Any) -> None:
    whole = {"rank": rank, "time": time, "user": False, "message": "m", "hint": None, "trace": "t", **body}
    write_json(run.path / "logs" / f"error-rank-{rank}.json", whole)


def told(run: RunFolder, before: int) -> Exception:
    """What is raised after ranks have left `error-rank-*.json` (which a gang that begins removes)."""
    kept = {path: path.read_bytes() for path in (run.path / "logs").glob("error-rank-*.json")}
    gang = Gang(run, TASK, Experiment.model_validate({"train": {"data": "x"}}), lambda *_, **__: None)
    for path, body in kept.items():
        path.write_bytes(body)
    said = (run.path / "logs" / "torchrun.log").read_text()[before:]
    with pytest.raises(Exception) as raised:
        gang.end(TaskFailed("train", "see torchrun.log"), _killed(gang, said))
    return raised.value


@pytest.mark.parametrize(("code", "name"), [(-9, "SIGKILL"), (-11, "SIGSEGV"), (-15, "SIGTERM")])
def test_a_killed_rank_is_named_even_if_others_failed_in_its_wake(run: RunFolder, code: int, name: str) -> None:
    log = run.path / "logs" / "torchrun.log"
    log.write_text(KILLED.format(code=code))
    error(run, 0, 5.0, message="RuntimeError: Connection closed by peer")
    found = told(run, 0)
    assert isinstance(found, TaskFailed)
    assert f"rank 3 was killed ({name})" in str(found)
    assert ("memory" in str(found)) == (code == -9)
    assert f"{log.parent}/rank-3.log" in str(found)


def test_a_rank_that_torchrun_ended_is_not_the_one_that_was_killed(run: RunFolder) -> None:
    """As a rank that hangs in a collective of GPUs: it hears no SIGTERM, and half a minute later is killed too."""
    log = run.path / "logs" / "torchrun.log"
    ended = "W0101 00:00:00.0 9 multiprocessing/api.py:1] Sending process 17 closing signal SIGTERM\n"
    log.write_text(ended + KILLED.format(code=-9).replace("exitcode  : 1 (", "exitcode  : -9 ("))
    assert "rank 3 was killed (SIGKILL)" in str(told(run, 0))


def test_what_an_earlier_start_left_in_the_log_does_not_count(run: RunFolder) -> None:
    size = (run.path / "logs" / "torchrun.log").stat().st_size
    error(run, 1, 7.0, message="RuntimeError: later")
    error(run, 0, 6.0, message="RuntimeError: first", trace="Traceback ...")
    found = told(run, size)
    assert isinstance(found, TaskFailed)
    assert str(found) == "train: rank 0: RuntimeError: first"
    assert found.trace == "Traceback ..."


def test_what_others_meet_in_the_wake_of_the_first_is_not_the_first(run: RunFolder) -> None:
    size = (run.path / "logs" / "torchrun.log").stat().st_size
    error(run, 0, 1.0, message="RuntimeError: [gloo] Read error: Connection reset by peer")
    error(run, 1, 2.0, message="ValueError: the cause")
    assert str(told(run, size)) == "train: rank 1: ValueError: the cause"


def test_an_error_for_the_user_stays_one(run: RunFolder) -> None:
    size = (run.path / "logs" / "torchrun.log").stat().st_size
    error(run, 1, 1.0, user=True, message="no", hint="yes")
    found = told(run, size)
    assert isinstance(found, UserError)
    assert (found.message, found.hint) == ("no", "yes")


def test_when_nobody_said_why_the_log_is_named(run: RunFolder) -> None:
    size = (run.path / "logs" / "torchrun.log").stat().st_size
    assert "torchrun.log" in str(told(run, size))


@pytest.mark.parametrize("when", ["at its start", "later"])
@pytest.mark.parametrize("how", ["another start", "moved"])
def test_a_rank_leaves_when_another_start_of_the_run_has_begun_or_its_folder_was_moved(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, when: str, how: str
) -> None:
    """As those of a cluster's job do that outlived a command which was killed, or waited in the queue until then."""
    left = list[int]()

    def leave(code: int) -> None:
        left.append(code)
        raise SystemExit

    def begin() -> str:
        gang = Gang(run, TASK, Experiment.model_validate({"train": {"data": "x"}}), lambda *_, **__: None)
        return gang.start[rank.START]

    start, order = begin(), run.path / "logs" / rank.ORDER
    monkeypatch.setattr(rank.os, "_exit", leave)
    rank._leave_if_followed(order, start)
    rank._leave_if_followed(order, None)
    assert not left
    if how == "moved":
        order.unlink()
    else:
        begin()
    if when == "later":
        monkeypatch.setattr(rank.threading, "Thread", Here)
        with pytest.raises(SystemExit):
            rank._live(run.path / "logs" / "alive-rank-0", start)
    else:
        with pytest.raises(SystemExit):
            rank._leave_if_followed(order, start)
    assert left == [FORCED]


class Here:
    """A thread that runs in the one that starts it."""

    def __init__(self, target: Callable[[], None], daemon: bool) -> None:
        self.start = target


def test_an_order_that_cannot_be_read_sends_no_rank_away(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank.os, "_exit", lambda code: pytest.fail("it left"))
    order = run.path / "logs" / rank.ORDER
    order.write_text("{")
    rank._leave_if_followed(order, "x")
