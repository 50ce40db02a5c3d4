"""Processes of the real command, killed where the test says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-c", "from plmsae_cli.cli.app import main; main()"]


@pytest.fixture
def plmsae() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `plmsae ...` to its end; `fault` is injected into it."""

    def run(*arguments: str, fault: str | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        environment.pop("PLMSAE_FAULT", None)
        if fault is not None:
            environment["PLMSAE_FAULT"] = fault
        return subprocess.run(
            [*COMMAND, *arguments], capture_output=True, text=True, timeout=240, check=False, env=environment, cwd=cwd
        )

    return run
