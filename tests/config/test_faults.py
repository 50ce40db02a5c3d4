"""Injected faults strike at the named pass and nowhere else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import timeit
from pathlib import Path

import pytest

from plmsae_cli.config import faults
from plmsae_cli.config.faults import InjectedFault, fault

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_passes_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_passes", type(faults._passes)())


def struck(spec: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which of twelve passes, four ranks at each of three steps, raise."""
    monkeypatch.setenv("PLMSAE_FAULT", spec)
    struck_at = []
    for i in range(12):
        fault("other.point", rank=i % 4, step=i // 4)
        try:
            fault("train.step", rank=i % 4, step=i // 4)
        except InjectedFault:
            struck_at.append(i)
    return struck_at


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("raise:train.step", [0]),
        ("raise:train.step:3", [2]),
        ("raise:train.step:13", []),
        ("raise:train.step:rank=1", [1]),
        ("raise:train.step:rank=1,step=2", [9]),
        ("raise:train.step:rank=1,3", [9]),
        ("raise:train.step:rank=7", []),
        ("raise:train.ste:1", []),
        ("raise:train.step:2;raise:train.step:5", [1, 4]),
    ],
)
def test_which_pass_is_struck(spec: str, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert struck(spec, monkeypatch) == expected


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("sigterm", signal.SIGTERM)])
def test_signals(action: str, number: int) -> None:
    code = "from plmsae_cli.config.faults import fault\nfor i in range(5): print(i, flush=True); fault('p')"
    env = os.environ | {"PLMSAE_FAULT": f"{action}:p:3"}
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert child.returncode == -number
    assert child.stdout.split() == ["0", "1", "2"]


def test_costs_nothing_when_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLMSAE_FAULT", raising=False)
    fastest = min(timeit.repeat(lambda: fault("p", rank=0), number=10_000, repeat=3)) / 10_000
    assert fastest < 20e-6  # about half a microsecond; room for a busy machine
