"""Readers that leave: `| head` and `| tee`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

COMMAND = [sys.executable, "-c", "from plmsae_cli.cli.app import main; main()"]


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    for verb in ("schema", "--help"):
        read, write = os.pipe()
        os.close(read)
        ended = subprocess.run([*COMMAND, verb], stdout=write, stderr=subprocess.PIPE, check=False)
        os.close(write)
        assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_run_whose_tee_goes_with_the_same_ctrl_c_is_interrupted_and_not_failed(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write("one.yaml", tokens=6_000_000, evaluation="")
    with subprocess.Popen(
        [*COMMAND, "run", str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("train ..."):
                break
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait() == 75
    assert json.loads((tmp_path / "runs" / "one" / "status.json").read_text())["state"] == "interrupted"
