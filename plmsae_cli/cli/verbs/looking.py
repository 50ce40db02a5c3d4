"""What there is, and how far it got."""

from __future__ import annotations

from pathlib import Path

import typer

from plmsae_cli.cli.options import Json
from plmsae_cli.cli.verbs.group import Root, Run, group

verbs, verb = group("Tools")


@verb()
def ls(
    root: Root = Path("runs"),
    json: Json = False,
) -> None:
    """List runs with their figures, and data folders with the runs that use them."""
    from plmsae_cli.cli.listing import list_root

    raise typer.Exit(list_root(root, json))


@verb()
def status(
    run: Run,
    json: Json = False,
) -> None:
    """Show how far one run is, and what came out."""
    from plmsae_cli.cli.listing import show_status

    raise typer.Exit(show_status(run, json))
