"""Write the tables of scale.md anew from the planner itself: `python docs/scale.py`."""

from __future__ import annotations

from pathlib import Path

from plmsae_cli.store.passes import (
    Effort,
    Passes,
    chunks_per_task,
    divide,
    held_rows,
    most_sorted,
    optimize_effort,
    shuffle_effort,
    sorted_shards,
)

PAGE = Path(__file__).with_name("scale.md")
BEGIN, END = "<!-- tables: made by docs/scale.py, do not edit -->", "<!-- end of tables -->"

ROW_BYTES = 2 * 1280
"""bfloat16 rows of ESM-2 650M."""
SPEED = 1e9
"""Bytes a second each way of one machine."""
MILLION_REQUESTS = 0.4
"""Dollars; a typical price of GETs."""
BLOCK_ROWS, CHUNK, SHARD = 8192, 512_000_000, 1_000_000_000
SIZES = {"10 TB": 10**13, "100 TB": 10**14, "1 PB": 10**15, "100 PB": 10**17}
MEMORIES = (16_000_000_000, 64_000_000_000)
MACHINES = (1, 8, 100)


def simulated(data: int, memory: int) -> tuple[Passes, Effort]:
    """What `shuffle` and `optimize` plan together for so many bytes of rows on S3."""
    rows = data // ROW_BYTES
    passes = divide(rows, ROW_BYTES, memory, remote=True)
    return passes, shuffle_effort(passes, ROW_BYTES, SHARD) + _reduce(passes, memory)


def bucketed(data: int, memory: int) -> Effort | None:
    """What `optimize` alone does after `embed.layout: bucketed`, its shards as large as the memory; None: too many shards."""
    rows, held = data // ROW_BYTES, held_rows(memory, ROW_BYTES)
    if -(-rows // held) > most_sorted(rows, ROW_BYTES, memory, remote=True):
        return None
    whole, rest = divmod(rows, held)
    return _reduce(sorted_shards([held] * whole + [rest] * (rest > 0)), memory)


def _reduce(passes: Passes, memory: int) -> Effort:
    chunk_rows = CHUNK // (BLOCK_ROWS * ROW_BYTES) * BLOCK_ROWS
    per_task = chunks_per_task(passes.rows, ROW_BYTES, chunk_rows, memory, remote=True)
    return optimize_effort(passes, ROW_BYTES, chunk_rows, per_task, memory)


def tables() -> str:
    """One table a memory."""
    return "\n".join(_table(memory) for memory in MEMORIES)


def _table(memory: int) -> str:
    head = [
        "data", "passes", "map", "merge", "reduce", "read", "written", "temporary", "requests", "of these $",
        *(f"{count} machine{'s' if count > 1 else ''}" for count in MACHINES),
        "bucketed: moved", *(f"bucketed: {count}" for count in MACHINES),
    ]  # fmt: skip
    lines = [f"### Tasks of {memory // 10**9} GB\n", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, data in SIZES.items():
        passes, moved = simulated(data, memory)
        levels = passes.levels()
        merges = sum(level.num_files for level in levels[1:])
        reduces = moved.tasks - levels[0].groups - merges - len(levels) - 1
        cells = [
            name,
            str(passes.count),
            f"{levels[0].groups:,}",
            f"{merges:,}" if merges else "-",
            f"{reduces:,}",
            _bytes(moved.bytes_read),
            _bytes(moved.bytes_written),
            _bytes(moved.temporary_bytes) if moved.temporary_bytes else "-",
            f"{moved.requests / 1e6:,.1f} M",
            f"{moved.requests / 1e6 * MILLION_REQUESTS:,.0f}",
            *(_time(moved.seconds(SPEED, count)) for count in MACHINES),
        ]
        after = bucketed(data, memory)
        cells += (
            ["-"] * (1 + len(MACHINES))
            if after is None
            else [
                f"{_bytes(after.bytes_read)} + {_bytes(after.bytes_written)}",
                *(_time(after.seconds(SPEED, count)) for count in MACHINES),
            ]
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _bytes(count: float) -> str:
    for limit, unit in ((1e15, "PB"), (1e12, "TB")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count / 1e9:.3g} GB"


def _time(seconds: float) -> str:
    hours = seconds / 3600
    if hours < 0.05:
        return f"{seconds / 60:.0f} min"
    return f"{hours / 24:,.0f} d" if hours >= 240 else f"{hours / 24:.1f} d" if hours >= 48 else f"{hours:.1f} h"


def refreshed(page: str) -> str:
    """The page with the tables between its two marks replaced."""
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
