"""What was predicted beside what came: the same units, dollars by the same price."""

from __future__ import annotations

from pathlib import Path

from plmsae_cli.runtime.foretold import PEAK, compared, foretell
from plmsae_cli.runtime.run_folder import write_json


def test_time_memory_and_dollars_of_stages_that_have_run(tmp_path: Path) -> None:
    foretell(tmp_path, "embed", {"hours": 0.5}, 2, 3.0)
    foretell(tmp_path, "train", {"predicted_seconds": 360.0, "memory_per_rank": 7}, 4, None)
    foretell(tmp_path, "eval", {"axes": []}, 1, 3.0)
    write_json(tmp_path / PEAK, {"bytes": 8})
    assert compared(tmp_path, {"embed": 3600.0, "train": 400.0, "eval": 1.0}) == {
        "embed": {"predicted": {"seconds": 1800.0, "usd": 3.0}, "measured": {"seconds": 3600.0, "usd": 6.0}},
        "train": {"predicted": {"seconds": 360.0, "memory": 7}, "measured": {"seconds": 400.0, "memory": 8}},
    }
    assert compared(tmp_path, {}) == {}
