"""Runs with files that a power cut left empty, zeroed or cut short: told of, and no other run is hidden by them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.runtime.metrics import MetricsFile
from plmsae_cli.runtime.results import last_metrics
from plmsae_cli.runtime.run_folder import RunFolder, write_json

Plmsae = Callable[..., Any]
DAMAGES = {
    "empty": ("status.json", b""),
    "cut short": ("status.json", b'{"state": "do'),
    "zeros": ("status.json", bytes(64)),
    "no object": ("status.json", b"[1]"),
    "figures": ("eval/metrics.json", b'{"fidelity'),
    "pointers": ("artifacts.json", b'{"embed": 3}'),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run that is whole and one to damage."""
    root = tmp_path / "runs"
    for name in ("sound", "worn"):
        run = RunFolder(root / name)
        run.status(state="done")
        write_json(run.path / "eval" / "metrics.json", {})
        run.metrics.write_text('{"step": 1, "loss": 2.5}\n')
        (run.path / "resolved.yaml").write_text(f"name: {name}\n")
    return root


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_damaged_run_is_told_of_and_hides_no_other(plmsae: Plmsae, root: Path, damage: str) -> None:
    name, content = DAMAGES[damage]
    (root / "worn" / name).write_bytes(content)
    listed = plmsae("ls", root)
    assert listed.code == 0
    assert [line.split()[:2] for line in listed.out.splitlines()[1:3]] == [["sound", "done"], ["worn", "damaged"]]
    assert f"worn/{name} is damaged" in listed.err
    assert "hint: move it aside" in listed.err
    runs = json.loads(plmsae("ls", root, "--json").out)["runs"]
    assert {run["name"]: run["state"] for run in runs} == {"sound": "done", "worn": "damaged"}
    if name != "artifacts.json":
        reported = plmsae("report", root)
        assert reported.code == 0
        assert f"worn/{name} is damaged" in reported.err
        page = (root / "index.html").read_text()
        assert "sound" in page
        assert "1 damaged, 1 done" in page
    if name == "status.json":
        for verb in (["status", root / "worn"], ["report", root / "worn"]):
            refused = plmsae(*verb)
            assert refused.code == 2
            assert f"worn/{name} is damaged" in refused.err
            assert "Traceback" not in refused.err


def test_a_damaged_manifest_hides_no_other_data(plmsae: Plmsae, root: Path) -> None:
    for key, body in (("aa", '{"stage": "embed", "key": "aa", "rows": 7}'), ("bb", "{}"), ("cc", "")):
        (root / f"data/embed-{key}").mkdir(parents=True)
        (root / f"data/embed-{key}" / "MANIFEST.json").write_text(body)
    listed = plmsae("ls", root)
    assert listed.code == 0
    assert "embed-aa" in listed.out
    assert listed.err.count("is damaged") == 2
    assert plmsae("ls", root / "data/embed-bb").code == 2


@pytest.mark.parametrize("rest", [b'{"step": 2, "lo', b'{"step": 2, "lo\n' + bytes(9) + b"\n", b"[]\nnull\n\xff\n"])
def test_curves_go_on_after_lines_that_are_none(root: Path, plmsae: Plmsae, rest: bytes) -> None:
    metrics = root / "worn" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + rest)
    assert last_metrics(root / "worn") == {"step": 1, "loss": 2.5}
    assert "last: step 1, loss 2.5" in plmsae("status", root / "worn").out
    assert "(2.5)" in plmsae("ls", root).out
    resumed = MetricsFile(metrics, step=1)
    resumed.add({"step": 2, "loss": 2.0})
    resumed.close()
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize(
    "words", [["ls", "."], ["ls", "nowhere"], ["status", "nothing"], ["logs", "nothing"]], ids=" ".join
)
def test_looking_needs_no_torch(tmp_path: Path, words: list[str]) -> None:
    """Two seconds of importing, also where all there is to say is an error."""
    code = (
        f"import sys; sys.argv = {['plmsae', *words]!r}\n"
        "from plmsae_cli.cli.app import main\n"
        "try: main()\n"
        "finally: print('modules:', *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if words == ["ls", "."] else 2)
    modules = done.stderr.rpartition("modules: ")[2].split()
    assert len(modules) > 50
    assert not {"torch", "matplotlib", "wandb"} & set(modules)
