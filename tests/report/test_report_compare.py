"""Runs side by side, and all runs on one page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from plmsae_cli.cli.app import app
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.tree import entries
from plmsae_cli.report.differences import differences, is_science
from plmsae_cli.report.versus import levels, timed


def go(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_science_is_what_names_artifacts_and_runs() -> None:
    """The oracle is the sections' own `science()`, which hashes are made of."""
    embed = {"fasta": "x", "layers": [1], "pooled": True}
    data: dict[str, Any] = {"embed": embed, "shuffle": {}, "optimize": {}, "train": {"sae": {}}}
    experiment = Experiment.model_validate(data)
    for name in ("embed", "shuffle", "optimize", "train"):
        section = getattr(experiment, name)
        known = {f"{name}.{field}" for field in leaves(section.science())}
        shown = {path for path in entries() if path in {f"{name}.{field}" for field in leaves(section.model_dump())}}
        absent = {
            "embed.fasta",
            "train.data",
            "train.imported",
            "train.sae.error",
        }  # inputs, and what keys lack where null
        assert {path for path in shown if is_science(path)} - absent == known & shown
    assert is_science("embed.fasta")
    assert not any(
        map(is_science, ("name", "root", "wandb.mode", "launch.ranks", "train.log_every", "embed.batch_tokens"))
    )


def leaves(body: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in body.items():
        found += leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return found


def test_differences_tell_results_from_comforts() -> None:
    one = {"name": "a", "train": {"lr": 1e-3, "log_every": 50, "sae": {"k": 16}}, "eval": {"fidelity": {"proteins": 8}}}
    two = {"name": "b", "train": {"lr": 1e-3, "log_every": 10, "sae": {"k": 32}}, "wandb": {"mode": "offline"}}
    found = [(each.field, each.values, each.science) for each in differences([one, two])]
    assert found == [
        ("train.sae.k", [16, 32], True),
        ("eval.fidelity.proteins", [8, None], True),
        ("train.log_every", [50, 10], False),
        ("wandb.mode", [None, "offline"], False),
    ]


def test_time_and_levels_in_closed_form() -> None:
    lines = [
        {"step": 10 * i, "tokens": 100 * i, "fvu": 1.0 / i, **({"step_ms": 50.0} if i > 1 else {})} for i in range(1, 9)
    ]
    slow = timed(lines)
    assert [line["seconds"] for line in slow] == pytest.approx([0.5 * i for i in range(1, 9)])
    fast = timed([{**line, "step_ms": 25.0} for line in lines])
    stops, rows = levels({"slow": slow, "fast": fast}, "fvu", "seconds")
    assert stops == pytest.approx([0.5, 1.0, 1.5, 2.0])  # the quarters of the fast run's two seconds
    assert [row[0] for row in rows] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert [row[1] for row in rows] == pytest.approx([(1 / a + 1 / (a + 1)) / 2 for a in (1, 3, 5, 7)])
    stops, rows = levels({"slow": slow, "fast": fast}, "fvu", "tokens")
    assert stops == [200, 400, 600, 800]
    assert all(a == b for a, b in rows)
    assert levels({"slow": slow}, "accuracy", "tokens")[1] == [[None]] * 4


def test_two_runs_on_one_page(tmp_path: Path, make: Any) -> None:
    one, two = make.write_run(tmp_path / "one"), make.write_run(tmp_path / "two")
    (two / "resolved.yaml").write_text(make.RESOLVED.replace("k: 32", "k: 64").replace("gpus: auto", "gpus: 2"))
    (two / "eval" / "metrics.json").unlink()  # begun, not evaluated: compared as far as it is
    shown = go("compare", one, two)
    assert shown.exit_code == 0, shown.output
    assert "settings that change results  one  two\ntrain.sae.k                   32   64\n" in shown.stdout
    assert "other settings  one   two\nlaunch.gpus     auto  2\n" in shown.stdout
    body = json.loads(go("compare", one, two, "--json").stdout)
    rows = {(row[0], row[1]): row[2:] for row in body["rows"]}
    assert rows["fidelity", "FVU"] == [0.16137, None]
    assert rows["training", "tokens"] == [4_096_000, 4_096_000]
    assert body["curves"]["tokens"]["fvu"]["at"] == [1_024_000, 2_048_000, 3_072_000, 4_096_000]
    page = make.Page(Path(body["report"]))
    titles = re.findall(r'<figcaption class="title">(.*?)</figcaption>', page.source)
    assert titles[:2] == ["FVU, by tokens", "FVU, by time"]
    assert page.attributes("style") == []
    assert page.attributes("src") == []
    for wrong, words in (
        ([one], "one run cannot be compared"),
        ([one, one], "is given twice"),
        ([one, "no"], "is not a run"),
    ):
        refused = go("compare", *wrong)
        assert refused.exit_code == 2
        assert words in refused.stderr


def test_the_trials_of_a_sweep_are_compared_one_by_one(tmp_path: Path, make: Any) -> None:
    sweep = make.write_sweep(tmp_path / "sizes")
    hashes = [trial["hash"] for trial in json.loads((sweep / "sweep.json").read_text())["trials"]]
    for name in hashes[1:3]:
        make.write_run(sweep / "trials" / name)
    body = json.loads(go("compare", sweep, "--json").stdout)
    assert body["columns"][2:] == hashes[1:3]


def test_an_index_of_all_runs(tmp_path: Path, make: Any) -> None:
    root = tmp_path / "runs"
    make.write_run(root / "good")
    (root / "good" / "report").mkdir()
    (root / "good" / "report" / "index.html").write_text("page")
    bare = make.write_bare(root / "begun")
    make.write_json(bare / "status.json", {"state": "failed", "updated": 1.8e9, "stage_seconds": {"embed": 61.0}})
    hostile = root / "<img src=x>"
    make.write_bare(hostile, plm=True)
    make.write_json(hostile / "status.json", {"state": "done"})
    damaged = make.write_bare(root / "damaged")
    (damaged / "resolved.yaml").write_text("{")
    make.write_json(damaged / "status.json", {"state": "interrupted"})
    done = go("report", root)
    assert done.exit_code == 0, done.output
    page = make.Page(root / "index.html")
    assert [attrs["href"] for tag, attrs in page.elements if tag == "a"] == ["good/report/index.html"]
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert "<img src=x>" in page.texts
    assert "2 done, 1 failed, 1 interrupted." in page.text
    body = page.source.split("<tbody>")[1].split("</tbody>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in body.split("</tr>")[:-1]]
    assert len(rows) == 4
    good = next(row for row in rows if "good" in row[0])
    assert good[1:9] == ["esm2_t6_8M_UR50D", "3", "topk", "2,560", "32", "0.161", "32.0", "2.1%"]
    assert (root / "index.html").read_bytes() == (go("report", root), (root / "index.html").read_bytes())[1]
    assert go("report", tmp_path / "none").exit_code == 2
    # Of one run, its own page anew.
    assert go("report", root / "good").exit_code == 0
    assert "FVU" in (root / "good" / "report" / "index.html").read_text()
