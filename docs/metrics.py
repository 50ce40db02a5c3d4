"""Write the table of metrics.md anew: `python docs/metrics.py`."""

from __future__ import annotations

from pathlib import Path

from plmsae_cli.runtime.metric_names import METRICS

PAGE = Path(__file__).with_name("metrics.md")
BEGIN, END = "<!-- metrics: made by docs/metrics.py, do not edit -->", "<!-- end of metrics -->"


def table() -> str:
    """A row a metric."""
    rows = [
        f"| `{each.name}` | {each.unit} | {'both' if len(each.kinds) > 1 else each.kinds[0]} | {each.meaning} |"
        for each in METRICS
    ]
    return "\n".join(["| name | unit | kind | meaning |", "|---|---|---|---|", *rows])


def refreshed(page: str) -> str:
    """The page with the table between its two marks replaced."""
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
