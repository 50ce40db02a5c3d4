"""The command as users meet it: in this process where that is enough, as a real one where signals matter."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import plmsae_cli
from tests.conftest import random_esm2

REPOSITORY = Path(plmsae_cli.__file__).parents[1]
ASSETS = Path(plmsae_cli.__file__).parent / "data"
PATIENCE_S = 240.0
"""Only what hangs takes so long, on any machine."""
# Linux ends it with its parent (PR_SET_PDEATHSIG, SIGKILL): a session of tests that is killed ends no trainings.
WITH_PARENT = "import ctypes; ctypes.CDLL(None).prctl(1, 9); " if sys.platform == "linux" else ""
COMMAND = [sys.executable, "-c", f"{WITH_PARENT}from plmsae_cli.cli.app import main; main()"]

YAML = """
root: {root}
data_root: {data}
model: {{weights: {weights}}}
embed: {{fasta: {fasta}, layers: [2], holdout: 0.1, dtype: float32, shard: 100kB}}
shuffle: {{seed: 3, memory: 200kB}}
optimize: {{chunk: 64kB, block_rows: 64}}
train:
  sae: {{expansion: 2, k: 4}}
  batch_tokens: 128
  tokens: {tokens}
  log_every: {log}
  checkpoint_every: {checkpoint}
{evaluation}
"""


@dataclass(frozen=True)
class Outcome:
    """What a command left on its streams, and its exit code."""

    code: int
    out: str
    err: str


Plmsae = Callable[..., Outcome]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of a tiny model, and a data root that all experiments of these tests share."""
    folder = tmp_path_factory.mktemp("shared")
    return {"weights": random_esm2(folder / "weights"), "data": folder / "data", "fasta": ASSETS / "smoke.fasta.gz"}


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No colour, a hundred columns, one thread."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def plmsae() -> Plmsae:
    """Run `plmsae ...` in this process."""
    from plmsae_cli.cli.app import app

    def run(*arguments: object) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                app([str(a) for a in arguments], prog_name="plmsae")
                code: Any = 0
            except SystemExit as left:
                code = left.code or 0
        return Outcome(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def write(tmp_path: Path, shared: dict[str, Path]) -> Callable[..., Path]:
    """Write an experiment through every stage; keywords replace parts of it, lines in `more` are appended.

    `evaluation=""` leaves eval out: quicker, where only the order of things matters.
    """

    def make(name: str = "one.yaml", more: str = "", **parts: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        evaluation = "eval: {fidelity: {proteins: 4}}"
        values = {
            **shared,
            "root": tmp_path / "runs",
            "tokens": 1280,
            "evaluation": evaluation,
            "log": 1,
            "checkpoint": 5,
        }
        values |= parts
        path.write_text(YAML.format(**values) + more)
        return path

    return make


class Process:
    """A real `plmsae ...`, and whatever it starts."""

    def __init__(self, folder: Path, *arguments: object, **environment: str) -> None:
        self._mark = uuid.uuid4().hex
        self._log = folder / f"process-{self._mark[:8]}.log"
        base = {k: v for k, v in os.environ.items() if k != "PLMSAE_FAULT"}
        base["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), base.get("PYTHONPATH", "")])
        with self._log.open("wb") as log:
            self.popen = subprocess.Popen(
                [*COMMAND, *map(str, arguments)],
                stdout=log,
                stderr=log,
                cwd=folder,
                env={**base, "PLMSAE_TEST_MARK": self._mark, **environment},
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def until(self, condition: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
        """Wait until something is so; the process must be alive till then."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.popen.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.02)

    def wait(self, seconds: float = PATIENCE_S) -> int:
        return self.popen.wait(seconds)

    def family(self) -> list[int]:
        """Processes alive (not zombies) that carry this one's mark: itself and all that it started."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                marked = self._mark.encode() in (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if marked and state != "Z":
                found.append(int(entry.name))
        return found

    def gone(self, seconds: float = PATIENCE_S) -> bool:
        """Whether every process of the family leaves in time."""
        end = time.monotonic() + seconds
        while self.family():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def end(self) -> None:
        for pid in self.family():
            os.kill(pid, signal.SIGKILL)
        self.popen.wait(10)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start a real `plmsae ...` in the background; nothing of it outlives the test."""
    started: list[Process] = []

    def run(*arguments: object, **environment: str) -> Process:
        started.append(Process(tmp_path, *arguments, **environment))
        return started[-1]

    yield run
    for process in started:
        process.end()
