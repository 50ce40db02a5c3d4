"""Write the tables of yaml.md anew from the experiment's tree: `python docs/fields.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from plmsae_cli.config.experiment import STAGES, Experiment
from plmsae_cli.config.tree import describe, entries

PAGE = Path(__file__).with_name("yaml.md")
BEGIN, END = "<!-- fields: made by docs/fields.py, do not edit -->", "<!-- end of fields -->"


def tables() -> str:
    """One table a section, the top of the file first, in the order of the tree."""
    leaves: dict[str, list[str]] = {"": []}
    for path, kind, default, text in describe():
        if entries()[path].section is not None:
            leaves[path] = []
            continue
        section, _, name = path.rpartition(".")
        mark = " ●" if _science(section, name) else ""
        leaves[section].append(f"| `{name}`{mark} | {_cell(kind)} | {_code(default)} | {_cell(text)} |")
    return "\n".join(_sections(leaves))


def refreshed(page: str) -> str:
    """The page with the tables between its two marks replaced."""
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    return f"{head}{BEGIN}\n\n{tables()}\n{END}{tail}"


def _sections(leaves: dict[str, list[str]]) -> Iterator[str]:
    for path, rows in leaves.items():
        if path:
            yield f"{'#' * (3 + path.count('.'))} {path}\n"
            yield f"{_cell(_about(path))}\n"
        else:
            yield "### At the top of the file\n"
        if rows:
            yield "| field | type | default | meaning |\n|---|---|---|---|"
            yield "\n".join(rows) + "\n"


def _about(path: str) -> str:
    entry = entries()[path]
    absent = " Default: absent, so it is not run." if path in STAGES else ""
    return f"{entry.help}{absent}"


def _science(section: str, name: str) -> bool:
    owner = entries()[section].section if section else Experiment
    assert owner is not None
    extra = owner.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("x-science"))


def _code(default: str) -> str:
    return default if default == "required" else f"`{default}`"


def _cell(text: str) -> str:
    """Text for a cell: `|` and `<` mean something else in Markdown, `<` only outside code."""
    parts = text.replace("|", "\\|").split("`")
    return "`".join(part if i % 2 else part.replace("<", "\\<") for i, part in enumerate(parts))


if __name__ == "__main__":
    PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
