"""What there is, and how far it got."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plmsae_cli.cli.options import Json
from plmsae_cli.cli.verbs.group import Root, Run, group

verbs, verb = group("Tools")


@verb()
def ls(
    root: Root = Path("runs"),
    leaderboard: Annotated[
        str | None,
        typer.Option(
            "--leaderboard",
            metavar="TRACK",
            help="Language-model runs, best first: speed, by the time to their target loss, or quality.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List runs with their figures, and data folders with the runs that use them."""
    if leaderboard is not None:
        from plmsae_cli.cli.leaderboard import show_leaderboard

        raise typer.Exit(show_leaderboard(root, leaderboard, json))
    from plmsae_cli.cli.listing import list_root

    raise typer.Exit(list_root(root, json))


@verb()
def status(
    run: Run,
    json: Json = False,
) -> None:
    """Show how far one run is, and what came out."""
    from plmsae_cli.cli.status import show_status

    raise typer.Exit(show_status(run, json))


@verb()
def logs(
    run: Run,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on with what is added, until the run ends.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="N", help="The output of one rank of a training on several.")
    ] = None,
    lines: Annotated[
        int, typer.Option("-n", "--lines", metavar="N", min=0, help="Lines to begin with; 200 unless set.")
    ] = 200,
) -> None:
    """Show what a run has said, and how it failed."""
    from plmsae_cli.cli.logs import show_logs

    raise typer.Exit(show_logs(run, follow, rank, lines))
