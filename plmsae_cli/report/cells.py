"""Tables and sections of a page, as plain values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from plmsae_cli.report.words import clean, count, number, percent

ROWS = 200
"""Rows of a table; the Parquet and CSV files have all."""
HEADLINES: dict[str, tuple[str, Callable[[float], str]]] = {
    "fvu": ("FVU", number),
    "l0_mean": ("L0", number),
    "dead_share": ("dead", percent),
    "recovered_zero": ("loss recovered", percent),
}
"""Figures of a run in tables of many, as `runtime.results.headline` names them: what they are called, and how they are shown."""


class Figure(NamedTuple):
    """A picture, what it shows, and a remark."""

    svg: Markup
    title: str
    caption: str = ""


class Cell(NamedTuple):
    """What is shown, and the number it is sorted by (empty: by the text)."""

    text: str
    sort: str = ""


class Table(NamedTuple):
    """A table that sorts in the browser: names of columns and whether they are numbers, and rows."""

    columns: Sequence[tuple[str, bool]]
    rows: Sequence[Sequence[Cell]]
    remark: str = ""


class Section(NamedTuple):
    """One axis on the page."""

    name: str
    title: str
    lead: str
    figures: Sequence[Figure]
    tables: Sequence[tuple[str, Table]]


def known(value: float | None, show: Callable[[float], str]) -> Cell:
    """A number as `show` has it; a dash where it is not known."""
    return Cell("–") if value is None else Cell(show(value), repr(float(value)))


def beyond(rows: int) -> str:
    """What the remark under a table of so many rows adds where not all are shown."""
    return f" Shown are the first {ROWS} of {count(rows)}." if rows > ROWS else ""


def decimal(value: float | None, digits: int = 3) -> Cell:
    """A number with so many places; nothing for None."""
    return Cell("", "") if value is None else Cell(f"{value:.{digits}f}", repr(float(value)))


def whole(value: int) -> Cell:
    """A whole number."""
    return Cell(count(value), str(value))


def latent(number: int) -> Cell:
    """A latent's number, which is a name: no thousands are separated."""
    return Cell(str(number), str(number))


def text(value: object) -> Cell:
    """Text of others, made harmless and short."""
    return Cell(clean(value, 80))
