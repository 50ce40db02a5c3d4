"""Figures for the terminal, and the choice of latents to show."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np

from plmsae_cli.report import build_report, summary
from plmsae_cli.report.examples import examples, split_context
from plmsae_cli.report.reading import read_run


def test_summary_is_pinned(run: Path) -> None:
    assert summary(run) == [
        ("FVU", "0.161"),
        ("L0", "32.0"),
        ("dead latents", "2.1%"),
        ("loss recovered, zero ablation", "95.8% [95.1%, 96.3%]"),
        ("loss recovered, mean ablation", "92.8% [91.9%, 93.6%]"),
        ("training rows", "198,877"),
        ("held-out rows", "21,484"),
        ("latents", "2,560"),
        ("time, embed", "1 min 04 s"),
        ("time, shuffle", "3.41 s"),
        ("time, optimize", "2.60 s"),
        ("time, train", "2 min 23 s"),
        ("time, eval", "21.7 s"),
    ]


def test_summary_leaves_out_what_is_absent(tmp_path: Path, make: Any) -> None:
    (tmp_path / "resolved.yaml").write_text("name: nothing-yet\n")
    assert summary(tmp_path) == []
    make.write_json(tmp_path / "eval" / "metrics.json", {**make.scores(), "fidelity": {"fvu": 0.5}})
    assert summary(tmp_path) == [("FVU", "0.500"), ("latents", "2,560")]


def test_pages_of_latents_are_named(tmp_path: Path, make: Any) -> None:
    run = tmp_path / "my run"
    run.mkdir()
    (run / "resolved.yaml").write_text("name: my-run\n")
    features = {"rows": 9, "described": 3, "pearson": 0.25, "spearman": 0.5}
    make.write_json(run / "eval" / "metrics.json", {**make.scores(), "fidelity": {}, "features": features})
    command = f"plmsae browse '{run}'"
    assert ("pages of latents", command) in summary(run)
    page = html.unescape(build_report(run).read_text())
    assert f"<code>{command}</code>" in page
    assert "mean Pearson 0.250, Spearman 0.500" in page


def test_rows_of_a_run_over_several_layers(tmp_path: Path, make: Any) -> None:
    (tmp_path / "resolved.yaml").write_text("name: layers\n")
    rows = {"embed-3": 70, "optimize-6": 64, "optimize-3": 64}
    pointers = {name: {"folder": f"data/{name}", "key": name, "rows": number} for name, number in rows.items()}
    make.write_json(tmp_path / "artifacts.json", pointers)
    assert summary(tmp_path) == [("training rows", "64")]


def test_the_figures_of_a_terminal_need_no_table_of_latents(run: Path) -> None:
    before = summary(run)
    (run / "eval" / "latents.parquet").write_text("PAR1")
    assert summary(run) == before


def test_examples_are_the_strongest_of_the_band(run: Path, make: Any) -> None:
    columns = make.write_latents(run / "eval" / "latents.parquet")
    latents = read_run(run).latents
    assert latents is not None
    shown = examples(latents)
    inside = [i for i, density in enumerate(columns["density"]) if 1e-4 <= density <= 1e-2]
    assert [row.latent for row in shown] == sorted(inside, key=lambda i: -columns["max"][i])[:20]


def test_the_marked_letter_is_the_residue(run: Path, make: Any) -> None:
    columns = make.write_latents(run / "eval" / "latents.parquet")
    latents = read_run(run).latents
    assert latents is not None
    shown = examples(latents, limit=10_000)
    assert len(shown) > 1000
    for row in shown:
        assert row.context is not None
        assert row.context[1] == columns["residue"][row.latent]
        assert "".join(row.context) == columns["top_context"][row.latent]


def test_contexts_that_say_nothing() -> None:
    assert split_context(None, 3) is None
    assert split_context("MKV", None) is None
    assert split_context("MKV", 0) == ("", "M", "KV")
    assert split_context("MKV", 9) == ("MKV", "", "")


def test_latents_without_examples(run: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {
        "latent": [0, 1],
        "density": [1e-3, 0.5],
        "max": [2.0, 9.0],
        "mean_active": [1.0, 1.0],
        "dead": [False, False],
    }
    pq.write_table(pa.table(table), run / "eval" / "latents.parquet")
    latents = read_run(run).latents
    assert latents is not None
    assert np.array_equal(latents.max, [2.0, 9.0])
    (only,) = examples(latents)
    assert (only.latent, only.density, only.protein, only.residue, only.context) == (0, "0.10%", "", "", None)
