"""A matplotlib figure as inline SVG that follows the page: its colours, its font, its security policy.

The policy forbids style attributes, so every one is rewritten: a colour of the palette becomes a class, which
the style sheet fills with the light or the dark variant, and anything else a presentation attribute.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, STONE, RULE, WASH = "#1c2024", "#60646c", "#b2b6be", "#e0e1e6", "#f1f2f6"
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#a6588c", "#56b4e9"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY)
"""Okabe and Ito's palette, distinguishable with any of the common kinds of colour blindness."""
_STYLES = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)))
_CLASSES = {
    INK: "ink", MUTED: "muted", STONE: "stone", RULE: "rule", WASH: "wash",
    BLUE: "blue", ORANGE: "orange", GREEN: "green", PURPLE: "purple", SKY: "sky",
}  # fmt: skip
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "text.parse_math": False,  # a "$" in somebody's file name is no formula
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 3.0,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_HREF = "{http://www.w3.org/1999/xlink}href"


def stroke(index: int) -> dict[str, Any]:
    """Colour and style of line number `index` of a picture: 20 that can be told apart."""
    return {"color": SERIES[index % len(SERIES)], "linestyle": _STYLES[index // len(SERIES) % len(_STYLES)]}


def draw(name: str, label: str, paint: Callable[[Axes], None], size: tuple[float, float] = (300, 192)) -> Markup:
    """Paint one pair of axes and return it as an `<svg>` element.

    Args:
        name: unique in its page; prefixes the ids inside.
        label: what the picture shows, for those who cannot see it.
        paint: draws on the axes it is given, in colours of this module only.
        size: width and height in points at scale 1.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_RC, "svg.hashsalt": name}):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        paint(figure.add_subplot())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Markup(_inline(buffer.getvalue(), name, label))


def _inline(document: bytes, name: str, label: str) -> str:
    root = ElementTree.fromstring(document)
    text = ElementTree.tostring(root, encoding="unicode")
    wanted = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    used = {one or other for one, other in wanted}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        # Matplotlib breaks lines inside elements for its readers; text nodes alone carry meaning.
        if element.tag != "text":
            element.text = None
        element.tail = None
        _rewrite(element, name, used)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("class", "plot")
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")


def _rewrite(element: ElementTree.Element, name: str, used: set[str]) -> None:
    if (identifier := element.attrib.pop("id", None)) in used:
        element.set("id", f"{name}-{identifier}")
    if target := element.attrib.pop(_HREF, None):
        element.set("href", f"#{name}-{target[1:]}")
    if clip := element.get("clip-path"):
        element.set("clip-path", clip.replace("url(#", f"url(#{name}-"))
    if path := element.get("d"):
        element.set("d", re.sub(r"-?\d+\.\d+|\s+", _shorter, path).strip())
    classes = []
    for declaration in filter(None, element.attrib.pop("style", "").split(";")):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font-family":
            continue
        if key in ("fill", "stroke") and value.startswith("#"):
            classes.append(f"{key[0]}-{_CLASSES[value]}")
        else:
            element.set(key, value.removesuffix("px") if key == "font-size" else value)
    if classes:
        element.set("class", " ".join(classes))


def _shorter(match: re.Match[str]) -> str:
    token = match.group()
    return " " if token.isspace() else f"{float(token):.2f}".rstrip("0").rstrip(".")
