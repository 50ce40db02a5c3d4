"""Stopping: the first wish is kept, the second is final, and a file will do as well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from plmsae_cli.runtime.stop import Stop

TWICE = """
import os, signal
from plmsae_cli.runtime.stop import STOP
STOP.install()
def act(text):
    def write(): os.write(1, text)
    return write
def fail(): raise OSError
with STOP.before_forced_exit(act(b"outer ")), STOP.before_forced_exit(fail), STOP.before_forced_exit(act(b"inner ")):
    with STOP.before_forced_exit(act(b"over ")):
        pass
    assert not STOP.requested()
    os.kill(os.getpid(), signal.SIGTERM)
    assert STOP.requested()
    os.write(1, b"asked ")
    os.kill(os.getpid(), signal.SIGINT)
    os.write(1, b"never")
"""


def test_the_first_signal_asks_and_the_second_leaves_after_the_last_acts() -> None:
    ended = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=False)
    assert ended.returncode == 130, ended.stderr
    assert ended.stdout == "asked inner outer "
    assert ended.stderr.count("press again to abort") == 1


def test_a_stop_file_asks_within_a_second_and_is_looked_for_no_oftener(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    stop = Stop()
    with stop.watching(tmp_path / "STOP"):
        assert not stop.requested()
        (tmp_path / "STOP").touch()
        clock[0] += 0.5
        assert not stop.requested()
        clock[0] += 0.6
        assert stop.requested()
        (tmp_path / "STOP").unlink()
        assert stop.requested()


def test_the_file_of_what_is_around_is_watched_too_and_that_of_what_is_over_no_more(tmp_path: Path) -> None:
    """A sweep's, while one of its trials is at work."""
    for name, heard in (("outer", True), ("inner", True), ("over", False)):
        stop = Stop()
        with stop.watching(tmp_path / "outer"):
            with stop.watching(tmp_path / "over"):
                pass
            with stop.watching(tmp_path / "inner"):
                (tmp_path / name).touch()
                stop._looked = -10.0
                assert stop.requested() == heard, name
        (tmp_path / name).unlink()
