"""W&B online, against a server that is down, refuses the key, breaks or dies in the middle: told once, and nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import plmsae_cli
from plmsae_cli.runtime.metrics import flat

MOODS = ("well", "down", "bad-key", "broken", "dies")
KEY = "0123456789abcdef" * 2 + "planted0"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, subprocess.Popen[str], str, str]]:
    """All moods at once: they wait more than they work."""
    pytest.importorskip("wandb")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = {**kept, "PYTHONPATH": str(Path(plmsae_cli.__file__).parents[1]), "WANDB_API_KEY": KEY}
    started = {}
    for mood in MOODS:
        folder = tmp_path_factory.mktemp(mood)
        command = [sys.executable, str(Path(__file__).with_name("wandb_hub.py")), mood, str(folder)]
        process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started[mood] = (folder, process)
    try:
        return {mood: (folder, process, *process.communicate()) for mood, (folder, process) in started.items()}
    finally:
        for _, process in started.values():
            process.kill()


@pytest.mark.parametrize("mood", MOODS)
def test_the_run_goes_on(ended: dict[str, Any], mood: str) -> None:
    folder, process, out, err = ended[mood]
    assert process.returncode == 0, err
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    found = json.loads(out)
    assert found["seconds"] < 200
    told = err.count("W&B stopped")
    assert told == {"well": 0, "down": 1, "bad-key": 1}.get(mood, told)
    assert told <= 1
    # The same names and values on both sides, nested ones joined by slashes.
    if mood == "well":
        sent = [{name: value for name, value in line.items() if not name.startswith("_")} for line in found["history"]]
        assert sent == [flat(line) for line in lines]


@pytest.mark.parametrize("mood", MOODS)
def test_results_follow_or_are_told_to_have_stayed(ended: dict[str, Any], mood: str) -> None:
    folder, _, out, err = ended[mood]
    found = json.loads(out)
    assert found["published"] < 200
    told = err.count("W&B has not taken the results (")
    assert told == {"well": 0, "down": 1, "bad-key": 1}.get(mood, told)
    assert told <= 1
    assert json.loads((folder / "eval" / "metrics.json").read_text())["fidelity"]["fvu"] == 0.25
    if mood == "well":
        assert found["summary"]["eval/fidelity/fvu"] == 0.25


def test_the_page_has_its_settings_project_and_group(ended: dict[str, Any]) -> None:
    begun = [run for run in json.loads(ended["well"][2])["runs"] if run["groupName"] is not None]
    assert len(begun) == 2, "training, then its results"
    assert json.loads(begun[0]["config"])["embed"]["value"]["layers"] == [7]
    known = (ended["well"][0] / "wandb-id").read_text()
    assert {(run["project"], run["groupName"], run["name"]) for run in begun} == {("features", "widths", known)}


@pytest.mark.parametrize("mood", MOODS)
def test_the_key_is_in_no_file_and_on_no_screen(ended: dict[str, Any], mood: str) -> None:
    folder, _, out, err = ended[mood]
    assert KEY not in out + err
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert KEY.encode() not in path.read_bytes(), path
