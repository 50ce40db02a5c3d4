"""The table of benchmarks is what the results say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_render", FOLDER / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


render = load()


def line(who: str, value: float, **changes: Any) -> str:
    body = {
        "name": "embed/650M", "who": who, "value": value, "unit": "residues/s", "run": "r2", "device": "H100",
        "date": "2025-02-01", "commit": "0123456789abcdef", "command": "python benchmarks/embed.py", "note": "",
    }  # fmt: skip
    return json.dumps({**body, **changes})


def cells(text: str, who: str) -> list[str]:
    (row,) = [row for row in text.splitlines() if row.startswith(f"| {who} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_ratios_and_shares() -> None:
    text = render.render(
        render.parse("\n".join([line("plmsae", 300), line("fair-esm fp16", 120), line("limit GEMM", 400)]))
    )
    assert cells(text, "**plmsae**") == ["**plmsae**", "300", "residues/s", "", ""]
    assert cells(text, "fair-esm fp16")[3] == "2.50"
    assert cells(text, "limit GEMM")[3] == "75 %"
    assert "H100, 2025-02-01, commit `0123456789ab`, run `r2`" in text
    assert "Where a peer is ahead" not in text


def test_less_time_is_better() -> None:
    lines = [line("plmsae", 20, unit="s"), line("peer", 30, unit="s"), line("limit disk", 5, unit="s")]
    text = render.render(render.parse("\n".join(lines)))
    assert cells(text, "peer")[3] == "1.50"
    assert cells(text, "limit disk")[3] == "25 %"


def test_a_peer_ahead_is_said() -> None:
    text = render.render(render.parse("\n".join([line("plmsae", 100), line("peer | fast", 150)])))
    assert "## Where a peer is ahead\n\n- `embed/650M`: peer \\| fast is 1.50 times as good as ours." in text


def test_the_newest_run_counts_whole() -> None:
    lines = [
        line("plmsae", 7, run="r3", date="2025-03-01"),
        line("plmsae", 300),
        line("old peer", 1),
        line("peer", 14, run="r3", date="2025-03-01"),
    ]
    text = render.render(render.parse("\n".join(lines)))
    assert "old peer" not in text
    assert cells(text, "peer")[3] == "0.50"
    # On one day the later line wins.
    text = render.render(render.parse("\n".join([line("plmsae", 1, run="a"), line("plmsae", 2, run="b")])))
    assert cells(text, "**plmsae**")[1] == "2"


def test_a_variant_is_ours_and_the_plain_one_is_the_reference() -> None:
    lines = [line("plmsae bf16 moments", 320), line("plmsae", 300), line("peer", 100)]
    text = render.render(render.parse("\n".join(lines)))
    assert cells(text, "peer")[3] == "3.00"
    assert cells(text, "**plmsae bf16 moments**")[3] == ""


def test_what_is_not_measured_is_said() -> None:
    text = render.render(render.parse(line("plmsae", 1)))
    absent = text.split("## Not measured")[1]
    assert "`embed/650M`" not in absent
    assert "`sae-step/S1`" in absent


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 is not JSON"),
        (json.dumps({"name": "x"}), "line 1 lacks"),
        (line("plmsae", 1, speed=3), "speed"),
        (line("plmsae", -1), "not a positive number"),
        (line("plmsae", 1) + "\n" + line(" ", 1), "line 2: who is empty"),
        (line("plmsae", 1) + "\n" + line("peer", 1, unit="s"), "residues/s"),
    ],
)
def test_a_line_out_of_form_is_named(text: str, message: str) -> None:
    with pytest.raises(render.ResultError, match=message):
        render.render(render.parse(text))


def test_check_fails_when_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.jsonl").write_text(line("plmsae", 1) + "\n")
    assert render.main(["--check"], tmp_path) == 1
    assert "stale" in capsys.readouterr().err
    assert render.main([], tmp_path) == 0
    assert render.main(["--check"], tmp_path) == 0
    (tmp_path / "results.jsonl").write_text(line("plmsae", 2) + "\n")
    assert render.main(["--check"], tmp_path) == 1


def test_the_repository_is_not_stale() -> None:
    assert render.main(["--check"]) == 0


def test_of_errors_the_smaller_is_the_better() -> None:
    text = render.render(render.parse("\n".join([line("plmsae", 0.2, unit="FVU"), line("peer", 0.1, unit="FVU")])))
    assert cells(text, "peer")[3] == "0.50"
