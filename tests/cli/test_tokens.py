"""Keys are asked for on a terminal, once, without echo, and only where one is wanted and absent."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import plmsae_cli

REPOSITORY = Path(plmsae_cli.__file__).parents[1]
SECRET = "k" * 32 + "secret"
Write = Callable[..., Path]


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A checkout whose environment is there already: what the script does beside setting up."""
    folder = tmp_path / "checkout"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / "run_experiments.sh").write_text((REPOSITORY / "run_experiments.sh").read_text())
    (folder / "setup.sh").write_text("#!/bin/sh\n")
    command = f"#!/bin/sh\nexec {sys.executable} -c 'from plmsae_cli.cli.app import main; main()' \"$@\"\n"
    (folder / ".venv" / "bin" / "plmsae").write_text(command)
    for script in ("run_experiments.sh", "setup.sh", ".venv/bin/plmsae"):
        (folder / script).chmod(0o755)
    return folder


def at_terminal(command: list[str], folder: Path, answer: str, **environment: str) -> tuple[int, str]:
    """Exit code and all that the terminal showed; `answer` is typed when a key is asked for."""
    ours, theirs = pty.openpty()
    keep = {name: os.environ[name] for name in ("PATH", "LANG", "OMP_NUM_THREADS") if name in os.environ}
    own = {"HOME": str(folder), "PYTHONPATH": str(REPOSITORY), "TERM": "dumb", **keep, **environment}
    process = subprocess.Popen(
        command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=own, start_new_session=True
    )
    os.close(theirs)
    shown, answered, end = "", False, time.monotonic() + 240
    while time.monotonic() < end:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                shown += os.read(ours, 4096).decode(errors="replace")
            except OSError:  # nobody holds the other side any more
                break
        elif process.poll() is not None:
            break
        if "(not shown" in shown and not answered:
            answered = True
            os.write(ours, answer.encode() + b"\n")
    os.close(ours)
    return process.wait(240), shown


def wanting(box: Path, write: Write) -> None:
    """An experiment that wants W&B, and ends before it would meet it."""
    path = write("asks.yaml", fasta="nowhere.fasta", more="wandb: {mode: online}\n")
    (box / "experiments").mkdir()
    path.rename(box / "experiments" / "asks.yaml")


def test_the_script_asks_for_the_wandb_key_without_echo(box: Path, write: Write) -> None:
    wanting(box, write)
    code, shown = at_terminal(["./run_experiments.sh"], box, SECRET)
    assert code == 2, shown
    assert shown.count("W&B API key (not shown") == 1
    assert "nowhere.fasta" in shown, "asked before anything is looked at"
    assert SECRET not in shown
    assert not any(SECRET.encode() in path.read_bytes() for path in box.rglob("*") if path.is_file())


@pytest.mark.slow
def test_it_asks_nobody_who_has_given_it_or_does_not_want_it(box: Path, write: Write) -> None:
    wanting(box, write)
    assert "(not shown" not in at_terminal(["./run_experiments.sh"], box, "", WANDB_API_KEY=SECRET)[1]
    path = box / "experiments" / "asks.yaml"
    path.write_text(path.read_text().replace("online", "offline"))
    assert "(not shown" not in at_terminal(["./run_experiments.sh"], box, "")[1]


def test_an_upload_asks_for_the_token_of_the_hub_without_echo(box: Path) -> None:
    pytest.importorskip("huggingface_hub")
    command = [".venv/bin/plmsae", "export", "nowhere", "--hf", "out", "--push", "owner/name"]
    code, shown = at_terminal(command, box, SECRET)
    assert code == 2, shown
    assert shown.count("Hugging Face token (not shown") == 1
    assert SECRET not in shown
