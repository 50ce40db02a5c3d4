"""Processes of the real command, killed where the test says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVER = """
import json, os, sys, traceback
import plmsae_cli.cli.app, plmsae_cli.cli.run, plmsae_cli.executors.local, plmsae_cli.executors.queue
import plmsae_cli.executors.trouble
import plmsae_cli.report.build, plmsae_cli.stages.embed, plmsae_cli.stages.evaluate, plmsae_cli.stages.optimize
import plmsae_cli.stages.shuffle, plmsae_cli.stages.train_sae

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for fd, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.environ.update(order["environment"])
            os.chdir(order["cwd"])
            sys.argv = ["plmsae", *order["arguments"]]
            plmsae_cli.cli.app.main()
            code = 0
        except SystemExit as left:
            code = left.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Forks the command from a process that has imported what it needs and done nothing else: what is killed is a real process of
its own, without the seconds that each start spends on imports."""


@pytest.fixture(scope="session")
def server() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("PLMSAE_FAULT", None)
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def plmsae(server: subprocess.Popen[str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `plmsae ...` to its end; `fault` is injected into it."""
    assert server.stdin is not None
    assert server.stdout is not None
    ask, answers = server.stdin, server.stdout
    out, err = tmp_path / "command.out", tmp_path / "command.err"

    def run(*arguments: str, fault: str | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # credentials of the test's bucket among them
        environment |= {} if fault is None else {"PLMSAE_FAULT": fault}
        order = {"arguments": arguments, "environment": environment, "cwd": str(cwd or ROOT)}
        ask.write(json.dumps({**order, "out": str(out), "err": str(err)}) + "\n")
        ask.flush()
        code = int(answers.readline())
        return subprocess.CompletedProcess(list(arguments), code, out.read_text(), err.read_text())

    return run
