"""Options that several verbs share, documented once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from plmsae_cli.cli.completion import fields

Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Change a field for this start, as --set train.lr=1e-4. May be repeated.",
        autocompletion=fields,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show every setting and what would be done, with sizes; touch nothing.")
]
Bugfix = Annotated[
    bool,
    typer.Option(
        "--bugfix",
        help="Smoke test: the same YAML cut down to seconds, with a tiny model and bundled proteins, in runs/bugfix.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON on stdout; messages stay on stderr.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="A plain line every 30 s instead of a live one.")]
WithInputs = Annotated[
    bool, typer.Option("--with-inputs", help="First run the earlier stages whose results are missing.")
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Put the run of this name aside (kept as NAME.archived-...) and begin anew.")
]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks", metavar="I/N", help="Do share I of N of the stage's tasks and leave; whoever does the last merges."
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Start even where the plan is beyond `limits` of the YAML.")]


@dataclass(frozen=True)
class Wishes:
    """What a verb that runs stages was asked for."""

    sets: Sequence[str] | None = None
    dry_run: bool = False
    bugfix: bool = False
    json: bool = False
    no_progress: bool = False
    with_inputs: bool = False
    restart: bool = False
    tasks: str | None = None
    yes: bool = False
    watch: bool = False

    @property
    def live(self) -> bool:
        """Whether progress may move on a terminal."""
        return not self.no_progress and not self.json
