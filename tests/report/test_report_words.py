"""Numbers and foreign text, written for people."""

from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.report.words import clean, clean_block, count, magnitude, number, percent, seconds


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.16137, "0.161"), (31.97, "32.0"), (32.0, "32"), (0.0, "0"), (1234.5, "1,234"), (999.96, "1,000"),
        (0.00012345, "0.000123"), (1.5e-5, "1.5 × 10⁻⁵"), (2.5e7, "2.5 × 10⁷"), (2.553e7, "2.55 × 10⁷"),
        (-0.25, "−0.250"), (math.nan, "n/a"), (math.inf, "n/a"),
    ],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@settings(deadline=None)
@given(st.floats(1e-4, 9.9e5), st.integers(2, 6))
def test_a_number_is_off_by_half_its_last_digit_at_most(value: float, digits: int) -> None:
    assert float(number(value, digits).replace(",", "")) == pytest.approx(value, rel=0.5001 * 10.0 ** (1 - digits))


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.95759, "95.8%"), (0.9907, "99.07%"), (0.0213, "2.1%"), (0.004, "0.40%"), (0.0, "0%"), (1.0, "100%"),
        (1.02, "102.0%"), (-0.31, "−31.0%"), (0.00001, "0.0010%"), (math.nan, "n/a"),
    ],
)  # fmt: skip
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_percentages_side_by_side_have_the_same_decimals() -> None:
    assert (percent(0.9893, 0.9921), percent(0.9921, 0.9893)) == ("98.93%", "99.21%")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.50 s"), (9.99, "9.99 s"), (59.4, "59.4 s"), (64.2, "1 min 04 s"), (3599.6, "1 h 00 min"),
        (3720, "1 h 02 min"), (200_000, "2 d 7 h"),
    ],
)  # fmt: skip
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text


def test_counts() -> None:
    assert count(198_877) == "198,877"
    assert [magnitude(n) for n in (410_000, 2_000_000_000, 4_096_000)] == [
        "410,000",
        "2 billion",
        "4.1 million",
    ]


@settings(deadline=None)
@given(st.text(), st.integers(1, 40))
def test_clean_text_is_short_and_visible(text: str, limit: int) -> None:
    cleaned = clean(text, limit)
    assert len(cleaned) <= limit
    assert not [c for c in cleaned if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029"]
    if len(text) <= limit and text.isprintable():
        assert cleaned == text


def test_clean_keeps_lines_of_a_block() -> None:
    assert clean_block("a: 1\n  b: \x1b[31m\u202ex\n") == "a: 1\n  b: \ufffd[31m\ufffdx"
