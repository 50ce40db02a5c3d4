"""What a run records of the code it was started with."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.runtime import environment
from plmsae_cli.runtime.run_folder import RunFolder


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of one commit, with the package in it."""
    package = tmp_path / "checkout" / "pkg"
    package.mkdir(parents=True)
    (package / "code.py").write_text("a = 1\nb = 2\n\n")
    (package.parent / "mine.yaml").write_text("name: x\n")
    git(package.parent, "init", "--quiet")
    git(package.parent, "add", "-A")
    git(package.parent, "commit", "--quiet", "-m", "one")
    monkeypatch.setattr(environment, "_PACKAGE", package)
    return package


def test_the_diff_makes_the_code_that_ran_from_its_commit(checkout: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    experiment = Experiment.model_validate({"name": "x", "embed": {"fasta": "x", "layers": [1]}})
    run.begin(experiment, None)
    assert environment.environment()["dirty"] is False
    assert not (run.path / "uncommitted.diff").exists()

    changed = "a = 1\nb = 3\nc = '\u00e9'\n\n"
    (checkout / "code.py").write_text(changed, encoding="utf-8")
    (checkout.parent / "mine.yaml").write_text("name: y\n")
    run.begin(experiment, None)
    assert environment.environment()["dirty"] is True
    assert "mine.yaml" not in (run.path / "uncommitted.diff").read_text(), "experiments are the run's own record"
    git(checkout, "checkout", "--quiet", ".")
    git(checkout.parent, "apply", str(run.path / "uncommitted.diff"))
    assert (checkout / "code.py").read_text(encoding="utf-8") == changed

    git(checkout, "checkout", "--quiet", ".")
    run.begin(experiment, None)
    assert not (run.path / "uncommitted.diff").exists(), "of the newest start"


def test_a_long_one_is_cut_and_says_so_new_files_are_named_and_secrets_starred(checkout: Path) -> None:
    (checkout / "code.py").write_text("hf_token = 'hf_abcdef'\n" + "d = 4\n" * 1000)
    (checkout / "new.py").touch()
    whole = environment.uncommitted()
    assert whole.startswith("not in git: pkg/new.py\ndiff --git")
    assert "hf_abcdef" not in whole
    cut = environment.uncommitted(longest=200)
    assert cut.startswith(whole[:200])
    assert cut[200:] == f"\n[cut: {len(whole):,} characters, of which the first 200 are kept]\n"


def test_the_index_of_the_checkout_is_left_alone(checkout: Path) -> None:
    """Git would refresh it on the way, and leave its lock there if this process were killed meanwhile."""
    index = checkout.parent / ".git" / "index"
    before = index.read_bytes()
    os.utime(checkout / "code.py", (1, 1))
    assert environment.environment()["dirty"] is False
    assert environment.uncommitted() == ""
    assert index.read_bytes() == before


def test_no_checkout_has_no_diff(checkout: Path) -> None:
    (checkout.parent / ".git").rename(checkout.parent / "was.git")
    assert environment.uncommitted() == ""
    assert environment.environment()["commit"] is None


@pytest.mark.parametrize(("said", "version"), [
    ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version: 12.2.0 \n",
     "535.129.03"),
    ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  570.86.15  Release Build\n", "570.86.15"),
    ("", None),
])  # fmt: skip
def test_driver(tmp_path: Path, said: str, version: str | None) -> None:
    (tmp_path / "version").write_text(said)
    assert environment._driver(tmp_path / "version") == version
    assert environment._driver(tmp_path / "nothing") is None
