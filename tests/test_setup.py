"""setup.sh asks for the torch build that the driver can run, by what nvidia-smi says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "setup.sh"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere pip's default wheel is taken")


@pytest.mark.parametrize(
    ("cuda", "build"), [("13.1", "cu130"), ("13.0", "cu130"), ("12.9", "cu128"), ("12.6", "cu126"), (None, "cpu")]
)
def test_the_newest_build_that_the_driver_runs(cuda: str | None, build: str, tmp_path: Path) -> None:
    told = which(cuda, tmp_path)
    assert (told.returncode, told.stdout) == (0, f"https://download.pytorch.org/whl/{build}\n")


def test_a_driver_that_is_too_old_is_told(tmp_path: Path) -> None:
    told = which("11.8", tmp_path)
    assert (told.returncode, told.stdout) == (1, "")
    assert "the driver runs CUDA 11.8" in told.stderr
    assert "hint: update the NVIDIA driver" in told.stderr


def which(cuda: str | None, folder: Path) -> subprocess.CompletedProcess[str]:
    tool = folder / "nvidia-smi"
    line = f"| NVIDIA-SMI 580.00   Driver Version: 580.00   CUDA Version: {cuda}     |"
    tool.write_text("#!/bin/sh\n" + ("exit 9\n" if cuda is None else f"echo '{line}'\n"))
    tool.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin"}
    command = ["bash", str(SCRIPT), "--which-torch"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
