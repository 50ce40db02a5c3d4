"""Options that several verbs share, documented once."""

from __future__ import annotations

from typing import Annotated

import typer

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change a field, as --set train.lr=1e-4. May be repeated."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; touch nothing.")]
Bugfix = Annotated[
    bool,
    typer.Option("--bugfix", help="The same YAML cut down to a smoke run of seconds: no network, no large input."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON on stdout.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="Plain lines instead of a live display.")]
WithInputs = Annotated[bool, typer.Option("--with-inputs", help="Also run the stages whose results are missing.")]
Restart = Annotated[bool, typer.Option("--restart", help="Archive the run of this name and begin again.")]
