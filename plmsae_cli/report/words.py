"""Numbers and foreign text, written for people."""

from __future__ import annotations

import math
import unicodedata

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 3) -> str:
    """`value` to `digits` significant digits, or to the unit where that says more.

    Whole numbers stay whole, and between 1e-4 and 1e6 there is no exponent.
    """
    if not math.isfinite(value):
        return "n/a"
    if value == round(value) and abs(value) < 1e6:
        return count(value).replace("-", "−")
    # Python's own rounding: 999.96 has its leading digit in the thousands once it is rounded.
    mantissa, _, exponent_text = f"{value:.{digits - 1}e}".partition("e")
    exponent = int(exponent_text)
    if -4 <= exponent < 6:
        return f"{value:,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")
    short = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{short} × {power(exponent)}".replace("-", "−")


def power(exponent: int) -> str:
    """A power of ten with a raised exponent: -3 -> 10⁻³."""
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def percent(share: float, *beside: float) -> str:
    """A share of 1 as a percentage; two decimals where one would hide it, here or in those `beside` it."""
    if not math.isfinite(share):
        return "n/a"
    if share in (0, 1):
        return f"{100 * share:.0f}%"
    if abs(share) < 1e-4:
        return f"{number(100 * share, 2)}%"
    fine = any(0 < abs(each) < 0.01 or 0.99 < each < 1 for each in (share, *beside))
    return f"{100 * share:.{2 if fine else 1}f}%".replace("-", "−")


def count(value: float) -> str:
    """A whole number with thousands separated."""
    return f"{round(value):,}"


def magnitude(value: float) -> str:
    """A large count, shortened: 1,234 -> 1,234; 2,000,000 -> 2 million."""
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            text = f"{value / size:.2f}".rstrip("0").rstrip(".")
            return f"{text} {name}"
    return count(value)


def seconds(value: float) -> str:
    """A duration in the two largest units that matter."""
    if value < 10:
        return f"{value:.2f} s"
    if value < 60:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    if minutes < 60 * 48:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def clean(text: object, limit: int = 120) -> str:
    """Foreign text on one line, at most `limit` characters, without anything invisible.

    Control and format characters (bidirectional overrides among them) become U+FFFD: a header of a FASTA file
    must not rearrange the page around it. This is no escaping; the template does that.
    """
    # Cut before looking at each character: a header can be megabytes long.
    raw = str(text)
    short = raw if len(raw) <= limit else raw[: limit - 1] + "…"
    return "".join("\ufffd" if unicodedata.category(c)[0] in "C" or c in "\u2028\u2029" else c for c in short)


def clean_block(text: str) -> str:
    """Foreign text of many lines, each made clean."""
    return "\n".join(clean(line, 1000) for line in text.splitlines())


def shortened(digest: str) -> str:
    """The first twelve characters of a hash; enough to compare by eye."""
    return clean(digest, 200)[:12]
