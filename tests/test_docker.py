"""The Dockerfile agrees with what is here: the files it copies, the extras it names, the versions that are pinned."""

from __future__ import annotations

import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text()
LINES = [line for line in TEXT.replace("\\\n", "").splitlines() if line and not line.startswith("#")]
RUNS = [line.removeprefix("RUN ") for line in LINES if line.startswith("RUN ")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_what_is_copied_is_here_and_is_all_that_the_package_is_built_of() -> None:
    copied = {source for line in LINES if line.startswith("COPY ") for source in line.split()[1:-1]}
    assert all((ROOT / source).exists() for source in copied), copied
    assert {PROJECT["readme"], "LICENSE", "pyproject.toml", "constraints.txt", "plmsae_cli"} <= copied
    assert all(any(Path(path).is_relative_to(source) for source in copied) for path in PROJECT["license-files"])
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not [(source, pattern) for source in copied for pattern in ignored if fnmatch(source, pattern)]


def test_extras_that_the_file_and_its_page_name_exist() -> None:
    page = (ROOT / "docs" / "docker.md").read_text()
    named = re.findall(r"EXTRAS=([a-z,]+)", TEXT + page)
    assert len(named) >= 3
    assert {extra for names in named for extra in names.split(",")} <= set(PROJECT["optional-dependencies"])


def test_nothing_is_installed_at_a_free_version() -> None:
    commands = [command for run in RUNS for command in re.split(r"&&|;", run) if "pip install" in command]
    assert len(commands) == 4
    assert all("constraints.txt" in command for command in commands), commands
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {"torch", "torchvision", "setuptools"} <= set(pinned)


def test_wheels_of_another_index_are_those_that_the_extras_want(tmp_path: Path) -> None:
    """torchvision of another build than torch's cannot be imported."""
    (install,) = [run for run in RUNS if "TORCH_INDEX" in run]
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "pip").chmod(0o755)

    def asked(index: str, extras: str) -> str:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TORCH_INDEX": index, "EXTRAS": extras}
        command = ["sh", "-ec", install]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
        return re.sub(r"==\S+", "", done.stdout.splitlines()[-1])

    assert asked("", "optuna") == "install -c constraints.txt torch"
    assert asked("https://x", "") == "install --no-deps --index-url https://x torch"
    assert asked("https://x", "optuna,litdata") == "install --no-deps --index-url https://x torch torchvision"


def test_a_user_without_rights_runs_the_command_and_triton_finds_a_compiler() -> None:
    kinds = [line.split()[0] for line in LINES]
    assert kinds.index("USER") > len(kinds) - kinds[::-1].index("RUN") - 1, "everything is installed before"
    (entry,) = re.findall(r'^ENTRYPOINT \["(\S+)"\]$', TEXT, re.MULTILINE)
    assert entry in PROJECT["scripts"]
    assert "gcc libc6-dev" in RUNS[0], "Triton builds the launchers of kernels where they run"
