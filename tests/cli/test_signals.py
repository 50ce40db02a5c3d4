"""Real processes and real signals: exit codes, a true status.json, and nobody left behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Plmsae = Callable[..., Any]
Start = Callable[..., Any]
Write = Callable[..., Path]
FOREVER = 128_000_000


def state(run: Path) -> str:
    return str(json.loads((run / "status.json").read_text())["state"])


def training(run: Path) -> Callable[[], bool]:
    """Whether the run has some steps behind it."""
    return lambda: step_of(run) > 5


def step_of(run: Path) -> int:
    """The step of the last whole line of metrics.jsonl: the next one may be half written."""
    path = run / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return int(json.loads(whole[-1])["step"]) if whole else 0


def at_work(process: Any, run: Path) -> Callable[[], bool]:
    """Whether the launcher, torchrun and both ranks are there, and the ranks have told how far they are."""
    return lambda: len(process.family()) == 4 and (run / "logs" / "gang-status.json").exists()


def rank_of(process: Any, rank: int) -> int:
    """The process id of one rank of a gang."""
    for pid in process.family():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if (
            f"RANK={rank}".encode() in environment
            and b"plmsae_cli.executors.rank" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ):
            return pid
    raise AssertionError(process.log)


@pytest.fixture
def data(plmsae: Plmsae, write: Write) -> None:
    """The dataset that all runs here train on."""
    assert plmsae("optimize", write("data.yaml"), "--with-inputs").code == 0


@pytest.mark.usefixtures("data")
def test_a_running_queue_is_locked_and_leaves_with_75_at_the_first_sigterm(
    plmsae: Plmsae, start: Start, write: Write, tmp_path: Path
) -> None:
    first = write("queue/a.yaml", tokens=FOREVER)
    write("queue/b.yaml", tokens=FOREVER)
    run = tmp_path / "runs" / "a"
    process = start("run", tmp_path / "queue", "--no-progress")
    process.until(training(run))
    assert state(run) == "running"

    for arguments in (["run", tmp_path / "queue"], ["run", first], ["train", first], ["train", first, "--restart"]):
        refused = plmsae(*arguments)
        assert refused.code == 4, refused.err
        assert "hint: " in refused.err
    queue = plmsae("run", tmp_path / "queue").err
    assert f"pid {process.popen.pid} on " in queue
    assert state(run) == "running"
    assert not list(run.parent.glob("a.archived*"))
    assert json.loads(plmsae("status", run, "--json").out)["state"] == "running"

    process.popen.send_signal(signal.SIGTERM)
    assert process.wait() == 75, process.log
    assert "stopping at the next safe point, press again to abort" in process.log
    assert "the same command continues" in process.log
    assert state(run) == "interrupted"
    assert not (tmp_path / "runs" / "b").exists()
    table = process.log[process.log.index("experiment  ") :].splitlines()
    assert [line.split()[:2] for line in table[1:3]] == [["a.yaml", "interrupted"], ["b.yaml", "pending"]]
    # The checkpoint is of the last step that metrics.jsonl tells of.
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    assert int(newest.name.removeprefix("step-")) == step_of(run)
    assert not (tmp_path / "queue" / ".queue.json").exists()


@pytest.mark.usefixtures("data")
def test_the_second_signal_quits_at_once_with_130(plmsae: Plmsae, start: Start, write: Write, tmp_path: Path) -> None:
    path = write("forced.yaml", tokens=FOREVER)
    run = tmp_path / "runs" / "forced"
    process = start("train", path, "--no-progress")
    process.until(training(run))
    os.kill(process.popen.pid, signal.SIGSTOP)  # so that both are there when it looks
    process.popen.send_signal(signal.SIGINT)
    process.popen.send_signal(signal.SIGTERM)
    os.kill(process.popen.pid, signal.SIGCONT)
    assert process.wait() == 130, process.log
    assert state(run) == "killed"
    assert plmsae("train", path, "--set", "train.tokens=0").code == 2  # the lock died with it: only the value is wrong


@pytest.mark.usefixtures("data")
def test_a_signal_during_start_up_is_an_interruption_too(start: Start, write: Write, tmp_path: Path) -> None:
    path = write("early.yaml", tokens=FOREVER)
    process = start("train", path, PYTHONPROFILEIMPORTTIME="1")  # tells what is being imported
    process.until(lambda: "plmsae_cli.config" in process.log)
    process.popen.send_signal(signal.SIGTERM)
    assert process.wait() == 75, process.log[-2000:]
    assert not (tmp_path / "runs" / "early" / "metrics.jsonl").exists()


@pytest.mark.usefixtures("data")
def test_a_gang_is_interrupted_continued_and_leaves_nobody_behind_whoever_is_killed(
    plmsae: Plmsae, start: Start, write: Write, tmp_path: Path
) -> None:
    path = write("gang.yaml", more="launch: {ranks: 2}\n", tokens=FOREVER)
    run = tmp_path / "runs" / "gang"

    # The first Ctrl-C: both ranks stop after the same step, with a checkpoint.
    process = start("train", path, "--no-progress")
    process.until(training(run))
    assert rank_of(process, 0) != rank_of(process, 1)
    process.popen.send_signal(signal.SIGINT)
    assert process.wait() == 75, process.log
    assert process.gone()
    assert state(run) == "interrupted"
    reached = step_of(run)
    assert (run / "checkpoints" / f"step-{reached:08d}").is_dir()

    # One rank is killed: the other leaves, the message names the one.
    process = start("train", path, "--no-progress")
    process.until(lambda: step_of(run) > reached + 5)
    os.kill(rank_of(process, 1), signal.SIGKILL)
    assert process.wait() == 1, process.log
    assert "rank 1 was killed (SIGKILL)" in process.log
    assert process.gone()
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], "rank 1 was killed" in status["error"]) == ("failed", True)

    # One rank is stopped: it is named, and nobody is left, not even the one that cannot notice anything.
    path.write_text(path.read_text().replace("ranks: 2", "ranks: 2, patience: 8"))
    process = start("train", path, "--no-progress")
    process.until(at_work(process, run))
    stopped = rank_of(process, 1)
    os.kill(stopped, signal.SIGSTOP)
    assert process.wait() == 1, process.log
    assert f"rank 1 (pid {stopped} on " in process.log
    assert "gave no sign of life for 8 s (launch.patience)" in process.log
    assert process.gone()
    assert "rank 1 (pid" in json.loads((run / "status.json").read_text())["error"]

    # The launcher is killed: the ranks notice.
    process = start("train", path, "--no-progress")
    process.until(at_work(process, run))
    os.kill(process.popen.pid, signal.SIGKILL)
    assert process.wait() == -9
    assert process.gone()
    assert json.loads(plmsae("status", run, "--json").out)["state"] == "killed"
    assert plmsae("train", path, "--dry-run").code == 0


@pytest.mark.slow
@pytest.mark.usefixtures("data")
def test_ranks_of_a_run_that_is_moved_do_not_go_on_where_nobody_sees_it(
    start: Start, write: Write, tmp_path: Path
) -> None:
    path = write("gang.yaml", more="launch: {ranks: 2}\n", tokens=FOREVER)
    run = tmp_path / "runs" / "gang"
    process = start("train", path, "--no-progress")
    process.until(at_work(process, run))
    run.rename(tmp_path / "elsewhere")
    assert process.wait() == 1, process.log
    assert "error: " + str(run / "metrics.jsonl") + " is gone: its run was deleted or moved" in process.log
    assert process.gone()


@pytest.mark.usefixtures("data")
def test_a_failing_stage_is_1_and_says_so_in_the_status(
    plmsae: Plmsae, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("fails.yaml")
    monkeypatch.setenv("PLMSAE_FAULT", "raise:train.step:3")
    failed = plmsae("train", path, "--json")
    assert failed.code == 1
    assert "InjectedFault" in failed.err
    assert json.loads(failed.out) == {"schema": 1, "state": "failed", "run": str(tmp_path / "runs" / "fails")}
    status = json.loads((tmp_path / "runs" / "fails" / "status.json").read_text())
    assert (status["state"], status["error"]) == ("failed", "injected fault at train.step")
    failed_at = status["updated"]
    monkeypatch.delenv("PLMSAE_FAULT")
    assert plmsae("train", path).code == 0
    status = json.loads((tmp_path / "runs" / "fails" / "status.json").read_text())
    assert (status["state"], status["error"], status["updated"] > failed_at) == ("done", None, True)


@pytest.mark.usefixtures("data")
def test_a_stop_file_interrupts_while_somebody_follows_the_log(start: Start, write: Write, tmp_path: Path) -> None:
    path = write("asked.yaml", tokens=FOREVER)
    run = tmp_path / "runs" / "asked"
    process = start("train", path, "--no-progress")
    process.until(training(run))
    follower = start("logs", run, "-f")
    follower.until(lambda: "train ..." in follower.log)
    (run / "STOP").touch()
    assert process.wait() == 75, process.log
    assert follower.wait() == 0
    *_, last, ended = follower.log.splitlines()
    assert last.endswith("train: stopped")
    assert ended == f"({run}: interrupted)"
    assert state(run) == "interrupted"
