"""Render benchmarks/results.jsonl to benchmarks/README.md.

    python benchmarks/render.py            write README.md
    python benchmarks/render.py --check    fail if README.md is not what the results say

One line of results.jsonl is one figure: name, who, value, unit, run, device, date, commit, command, note.
Lines measured together share a run. The newest run of a name counts (by date, then by place in the file);
older ones stay as history. `who` says whose figure it is: `plmsae` (or `plmsae` and a variant) is ours, `limit`
and what limits is a bound from the hardware, anyone else is a peer.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

HERE = Path(__file__).parent
NAMES = (
    "embed/650M", "embed/3B", "sae-step/S1", "sae-step/S2", "sae-step/S3", "sae-step/S4", "sae-step/switch",
    "sae-train/S2-cache", "sae-train/switch-s3", "data/shuffle-optimize-8GB", "data/stream-cache",
    "data/stream-s3", "data/stream-s3-50ms", "plm/133M", "eval/concepts", "eval/interventions", "features/collect-encode",
)  # fmt: skip
"""Names that will be claimed; those without a line are listed as not measured."""
_SMALLER_IS_BETTER = ("s", "CPU s", "ms", "us", "min", "h", "FVU", "share of the variance", "relative L2", "nats", "MB")
"""Units of which less is better; of all others more is."""


class ResultError(ValueError):
    """A line of results.jsonl that cannot be rendered."""


@dataclass(frozen=True)
class Result:
    """One line of results.jsonl."""

    name: str
    who: str
    value: float
    unit: str
    run: str
    device: str
    date: str
    commit: str
    command: str
    note: str = ""

    @property
    def ours(self) -> bool:
        return self.who.split()[0].rstrip(",") == "plmsae"

    @property
    def limit(self) -> bool:
        return self.who.split()[0] == "limit"


def parse(text: str) -> list[Result]:
    """The results of the file's text, in its order.

    Raises:
        ResultError: names the line and what is wrong with it.
    """
    results = []
    known = {field.name for field in fields(Result)}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            body = json.loads(line)
        except ValueError as error:
            raise ResultError(f"line {number} is not JSON: {error}") from error
        missing = known - {"note"} - body.keys()
        if missing or body.keys() - known:
            wrong = ", ".join(sorted(missing | (body.keys() - known)))
            raise ResultError(f"line {number} lacks or has beyond the form: {wrong}")
        result = Result(**body)
        if not isinstance(result.value, int | float) or not math.isfinite(result.value) or result.value <= 0:
            raise ResultError(f"line {number}: value {result.value!r} is not a positive number")
        if not result.who.strip():
            raise ResultError(f"line {number}: who is empty")
        results.append(result)
    return results


def newest(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Name -> the lines of its newest run, names in the order of NAMES and then by alphabet."""
    last: dict[str, Result] = {}
    for result in results:
        if result.name not in last or result.date >= last[result.name].date:
            last[result.name] = result
    order = {name: place for place, name in enumerate(NAMES)}
    names = sorted(last, key=lambda name: (order.get(name, len(order)), name))
    return {name: [r for r in results if r.name == name and r.run == last[name].run] for name in names}


def reference(lines: Sequence[Result]) -> Result | None:
    """Our figure among a run's lines: plain `plmsae` if it is there, else the first variant."""
    ours = [line for line in lines if line.ours]
    return next((line for line in ours if line.who == "plmsae"), ours[0] if ours else None)


def ratio(ours: Result, other: Result) -> float:
    """How many times better ours is than the other: above 1 we are ahead, whatever the unit."""
    if ours.unit != other.unit:
        raise ResultError(f"{ours.name}: {ours.who} is in {ours.unit}, {other.who} in {other.unit}")
    less_is_better = ours.unit in _SMALLER_IS_BETTER
    return other.value / ours.value if less_is_better else ours.value / other.value


def misses(groups: dict[str, list[Result]]) -> list[str]:
    """One line for each peer that is ahead of us."""
    found = []
    for name, lines in groups.items():
        ours = reference(lines)
        for line in lines:
            if ours is not None and not line.ours and not line.limit and ratio(ours, line) < 1:
                found.append(f"`{name}`: {_cell(line.who)} is {1 / ratio(ours, line):.2f} times as good as ours.")
    return found


def render(results: Sequence[Result]) -> str:
    """The whole README.md."""
    groups = newest(results)
    parts = [
        "# Benchmarks",
        "Rendered from `results.jsonl` by `python benchmarks/render.py`; do not edit. For each name the"
        " newest run counts, and all lines of a table were measured in that one run. “Ours against it” says how many"
        " times better ours is (above 1 we are ahead), and for a limit which share of it we reach.",
    ]
    if not groups:
        parts.append("Nothing has been measured yet.")
    parts += [_section(name, lines) for name, lines in groups.items()]
    if behind := misses(groups):
        parts.append("## Where a peer is ahead\n\n" + "\n".join(f"- {line}" for line in behind))
    if absent := [f"`{name}`" for name in NAMES if name not in groups]:
        parts.append("## Not measured\n\n" + ", ".join(absent))
    return "\n\n".join(parts) + "\n"


def _section(name: str, lines: Sequence[Result]) -> str:
    ours = reference(lines)
    rows = [f"## {name}", "", "| who | figure | unit | ours against it | note |", "|---|--:|---|--:|---|"]
    ranked = sorted(lines, key=lambda line: (line is not ours, not line.ours, line.limit))
    for line in ranked:
        who = f"**{_cell(line.who)}**" if line.ours else _cell(line.who)
        cells = (who, _value(line.value), _cell(line.unit), _against(ours, line), _cell(line.note))
        rows.append(f"| {' | '.join(cells)} |")
    shown = ours or lines[0]
    facts = f"{_cell(shown.device)}, {shown.date}, commit `{shown.commit[:12]}`, run `{shown.run}`"
    commands = dict.fromkeys(line.command for line in ranked)
    return "\n".join([*rows, "", facts, "", "```", *commands, "```"])


def _against(ours: Result | None, line: Result) -> str:
    if ours is None or line.ours:
        return ""
    value = ratio(ours, line)
    return f"{100 * value:.0f} %" if line.limit else f"{value:.2f}"


def _value(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(arguments: Sequence[str] | None = None, folder: Path = HERE) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Render benchmarks/results.jsonl to benchmarks/README.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if README.md is stale")
    options = parser.parse_args(arguments)
    source, target = folder / "results.jsonl", folder / "README.md"
    try:
        text = render(parse(source.read_text(encoding="utf-8")))
    except ResultError as error:
        print(f"{source}: {error}", file=sys.stderr)
        return 1
    if not options.check:
        target.write_text(text, encoding="utf-8")
        return 0
    if target.is_file() and target.read_text(encoding="utf-8") == text:
        return 0
    print(f"{target} is stale\nhint: run python benchmarks/render.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
