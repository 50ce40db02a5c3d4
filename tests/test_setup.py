"""setup.sh asks for the torch build that the driver can run, by what nvidia-smi says."""

from __future__ import annotations

import shutil
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


FINISHED = """#!/bin/sh
mkdir -p .venv/bin
echo '#!/bin/sh' > .venv/bin/plmsae
chmod +x .venv/bin/plmsae
printf '%s' "$(cat pyproject.toml constraints.txt | cksum) $PWD" > .venv/.plmsae-setup
"""


def test_a_second_start_waits_for_the_first_and_finds_its_work_done(tmp_path: Path) -> None:
    done, asked = set_up(tmp_path, flock=FINISHED)
    assert (done.returncode, asked) == (0, "")


def test_an_environment_that_was_killed_before_it_had_pip_is_made_again(tmp_path: Path) -> None:
    half = tmp_path / "copy" / ".venv" / "bin" / "python"
    half.parent.mkdir(parents=True)
    program(half, "#!/bin/sh\nexit 1\n")
    done, asked = set_up(tmp_path, flock="#!/bin/sh\n")
    assert done.returncode != 0, "the interpreter of this test makes none"
    assert "-m venv .venv" in asked


def set_up(folder: Path, flock: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run a copy of the script; what it asked an interpreter for that does nothing, and fails to make an environment."""
    copy, tools = folder / "copy", folder / "tools"
    for place in (copy, tools):
        place.mkdir(exist_ok=True)
    for name in ("setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(SCRIPT.with_name(name), copy)
    program(tools / "flock", flock)
    program(tools / "python", f'#!/bin/sh\necho "$*" >> {folder}/asked\n[ "$2" != venv ]\n')
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "PYTHON": str(tools / "python")}
    done = subprocess.run(
        ["bash", str(copy / "setup.sh")], capture_output=True, text=True, check=False, env=environment
    )
    return done, (folder / "asked").read_text() if (folder / "asked").exists() else ""


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def which(cuda: str | None, folder: Path) -> subprocess.CompletedProcess[str]:
    tool = folder / "nvidia-smi"
    line = f"| NVIDIA-SMI 580.00   Driver Version: 580.00   CUDA Version: {cuda}     |"
    program(tool, "#!/bin/sh\n" + ("exit 9\n" if cuda is None else f"echo '{line}'\n"))
    environment = {"PATH": f"{folder}:/usr/bin:/bin"}
    command = ["bash", str(SCRIPT), "--which-torch"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
