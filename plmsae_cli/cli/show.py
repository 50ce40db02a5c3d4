"""Plans and results as text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plmsae_cli.runtime.task import Plan


def print_json(**body: Any) -> None:
    """The one object on stdout that `--json` promises."""
    print(json.dumps({"schema": 1, **body}))


def size(count: float) -> str:
    """Bytes as people say them: 1.5 GB."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f} B"


def dollars(amount: float | None) -> str:
    """$1,234.50; a dash where no price is known."""
    return "-" if amount is None else f"${amount:,.2f}"


def nested(name: str, figures: Mapping[str, Any]) -> Iterator[float]:
    """Every figure of this name in a plan's figures, sections within sections included."""
    for key, found in figures.items():
        if isinstance(found, Mapping):
            yield from nested(name, found)
        elif key == name:
            yield float(found)


def bytes_to_make(plans: Iterable[Plan]) -> int:
    """Of all artifacts that are not there yet."""
    return sum(made.bytes for plan in plans for made in plan.artifacts.values() if not made.done)


def _value(name: str, found: Any) -> str:
    from plmsae_cli.config.tree import plain

    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return plain(found)
    if name.startswith(("bytes", "memory")) or name.endswith("bytes"):
        return size(found)
    return f"{found:,}"


def plan_lines(plan: Plan) -> list[str]:
    """A plan for the terminal."""
    lines = [f"{plan.stage}: {plan.note or 'done already' if plan.done else f'{len(plan.tasks)} task(s) to do'}"]
    for role, made in plan.artifacts.items():
        lines.append(f"  {role}: {made.folder}{' (exists)' if made.done else ''}")
    lines += _figures(plan.figures, "  ")
    return lines


def _figures(figures: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for name, found in figures.items():
        if isinstance(found, Mapping):
            lines.append(f"{indent}{name}:")
            lines += _figures(found, indent + "  ")
        else:
            lines.append(f"{indent}{name}: {_value(name, found)}")
    return lines


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan for scripts."""
    return {
        "stage": plan.stage,
        "done": plan.done,
        "tasks": [{"id": t.id, "cost": t.cost, "needs": list(t.needs)} for t in plan.tasks],
        "artifacts": {
            role: {"folder": a.folder, "key": a.key, "done": a.done, "rows": a.rows, "bytes": a.bytes}
            for role, a in plan.artifacts.items()
        },
        "figures": dict(plan.figures),
    }


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Columns, left-aligned, readable without colour."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join(lines)


def settings(body: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    """Every field of a resolved experiment, and where its value is from."""
    from plmsae_cli.config.tree import plain

    shown = [(f"{name}: {plain(found)}", origins[name]) for name, found in _flat(body) if name in origins]
    width = min(max(len(text) for text, _ in shown), 72)
    return [f"{text:<{width}}  # {origin}" for text, origin in shown]


def _flat(body: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, item in body.items():
        if isinstance(item, Mapping) and item:
            found += _flat(item, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", item))
    return found
