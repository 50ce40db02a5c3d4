"""Tables of several axes as one."""

from __future__ import annotations

import pyarrow as pa

from plmsae_cli.evaluation.merging import _by_id


def test_a_protein_has_one_row_whichever_axes_embedded_it() -> None:
    first = pa.table({"id": ["a", "b", "c"], "length": [3, 4, 5], "families": [["x"], [], ["x", "y"]]})
    second = pa.table({"id": ["d", "b"], "length": [6, 4], "half": ["test", None]})
    assert _by_id([first, second]).to_pylist() == [
        {"id": "a", "length": 3, "families": ["x"], "half": None},
        {"id": "b", "length": 4, "families": [], "half": None},
        {"id": "c", "length": 5, "families": ["x", "y"], "half": None},
        {"id": "d", "length": 6, "families": None, "half": "test"},
    ]
