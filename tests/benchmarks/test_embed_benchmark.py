"""The embedding benchmark in its smallest form: it runs, its gates hold, its lines can be rendered."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_quick_writes_lines_that_render(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    command = [sys.executable, str(FOLDER / "embed.py"), "--quick", "--results", str(results)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER.parent)
    assert run.returncode == 0, run.stderr
    assert "every gate held" in run.stdout
    spec = importlib.util.spec_from_file_location("render", FOLDER / "render.py")
    assert spec is not None
    assert spec.loader is not None
    render = importlib.util.module_from_spec(spec)
    sys.modules["render"] = render
    spec.loader.exec_module(render)
    who = {line.who for line in render.parse(results.read_text()) if line.name == "embed/tiny"}
    assert {"plmsae", "fair-esm fp32", "limit (disk)"} <= who
