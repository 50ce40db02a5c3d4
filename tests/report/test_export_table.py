"""Texts of a CSV that spreadsheets would run."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa

from plmsae_cli.report.export import write_csv


def test_no_cell_of_text_begins_a_formula(tmp_path: Path) -> None:
    texts = ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "plain", "a=b", "", None]
    table = pa.table({"concept": texts, "effect": [-1.5] * 10, "number": list(range(-5, 5))})
    write_csv(table, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["concept"] for row in rows] == ["'" + text for text in texts[:6]] + ["plain", "a=b", "", ""]  # type: ignore[operator]
    assert [float(row["effect"]) for row in rows] == [-1.5] * 10  # numbers stay numbers
    assert [int(row["number"]) for row in rows] == list(range(-5, 5))
