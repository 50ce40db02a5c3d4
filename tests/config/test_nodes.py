"""YAML text to data with places: against ruamel's own loader, and against the text itself."""

from __future__ import annotations

import io
import math
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from plmsae_cli.config.nodes import parse

KEYS = st.text(alphabet="abcdefgh_", min_size=1, max_size=6)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(alphabet="ab: #'\"-\n{}[]éß", max_size=12)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


def dumped(value: Any, flow: bool) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = flow
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()


@settings(deadline=None, max_examples=60)
@given(data=st.dictionaries(KEYS, VALUES, min_size=1, max_size=4), flow=st.booleans())
def test_data_and_places_are_those_of_the_text(data: dict[str, Any], flow: bool) -> None:
    text = dumped(data, flow)
    assume(YAML(typ="safe", pure=True).load(text) == data)  # some plain scalars are not read back as they were written
    document = parse(text, "f.yaml")
    assert document.problems == []
    assert document.data == data
    lines = text.split("\n")
    for path, place in document.places.items():
        line, column = place.key
        if isinstance(path[-1], str):
            assert lines[line][column:].startswith(path[-1])
        else:
            # A list item begins behind a dash or a bracket or a comma, or, on its own line, behind blanks.
            assert lines[line][:column].rstrip().endswith(("-", "[", ",", ":", "?", "")), (path, place)


@settings(deadline=None, max_examples=100)
@given(
    st.from_regex(
        r"[-+]?[0-9][0-9_]{0,5}(\.[0-9_]{0,4})?([eE][-+]?[0-9]{1,2})?|0o[0-7]{1,4}|0x[0-9A-F]{1,4}", fullmatch=True
    )
)
def test_numbers_agree_with_ruamel(number: str) -> None:
    ours = parse(f"a: {number}", "f.yaml").data["a"]
    theirs = YAML(typ="rt").load(f"a: {number}")["a"]
    assert ours == theirs
    assert isinstance(ours, str) == isinstance(theirs, str)


def test_spellings_of_a_small_rate_are_floats() -> None:
    for text in ("1e-4", "1E-4", "1.e-4", ".0001", "0.1e-3", "+1e-04"):
        value = parse(f"lr: {text}", "f.yaml").data["lr"]
        assert isinstance(value, float)
        assert math.isclose(value, 1e-4)


def test_dates_times_and_signs_stay_text() -> None:
    text = "a: 2026-01-31\nb: 1:30\nc: =\nd: -_\ne: _\n"
    assert parse(text, "f.yaml").data == {"a": "2026-01-31", "b": "1:30", "c": "=", "d": "-_", "e": "_"}


def test_earlier_merges_win_and_own_keys_win_over_all() -> None:
    text = "a: &a {x: 1, y: 1, z: 1}\nb: &b {y: 2, z: 2, w: 2}\nc: {<<: [*a, *b], z: 3}\n"
    assert parse(text, "f.yaml").data["c"] == {"x": 1, "y": 1, "z": 3, "w": 2}


def test_problems_of_one_text_come_all_at_once() -> None:
    document = parse("a: !x 1\nb: {c: 1, c: 2}\nd: .nan\n3: x\n", "f.yaml")
    assert [(p.line, p.column, p.path) for p in document.problems] == [
        (4, 1, ""), (1, 4, "a"), (2, 11, "b.c"), (3, 4, "d"),
    ]  # fmt: skip
