"""docs/scale.md is what the planner says today."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def _scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_scale", DOCS / "scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_fresh() -> None:
    page = (DOCS / "scale.md").read_text(encoding="utf-8")
    assert page == _scale().refreshed(page), "run: python docs/scale.py"


def test_bytes_follow_from_the_passes() -> None:
    """Every pass reads and writes all rows once; the places beside them are eight bytes of 2,560."""
    scale = _scale()
    for data in scale.SIZES.values():
        for memory in scale.MEMORIES:
            passes, moved = scale.simulated(data, memory)
            assert moved.bytes_read == pytest.approx(passes.count * data, rel=0.01)
            assert moved.bytes_written == pytest.approx(passes.count * data, rel=0.01)


def test_bucketed_leaves_one_reading_and_one_writing_where_two_passes_do() -> None:
    scale = _scale()
    for data in scale.SIZES.values():
        for memory in scale.MEMORIES:
            passes, moved = scale.simulated(data, memory)
            after = scale.bucketed(data, memory)
            assert (after is None) == (passes.count > 2)
            if after is not None:
                assert after.bytes_read == pytest.approx(data, rel=0.01)
                assert after.bytes_written == pytest.approx(data, rel=0.01)
                assert 2 * after.seconds(1e9) == pytest.approx(moved.seconds(1e9), rel=0.01)
