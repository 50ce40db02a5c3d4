"""Many runs at once: side by side, and all on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plmsae_cli.cli.completion import runs_and_yamls
from plmsae_cli.cli.options import Json
from plmsae_cli.cli.verbs.group import Root, group

verbs, verb = group("Tools")


@verb(
    epilog="""
    plmsae compare first second         two runs under runs/
    plmsae compare a.yaml runs/big      experiments and folders
    plmsae compare runs/sizes           the trials of a sweep
    """
)
def compare(
    targets: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|YAML...",
            help="Folders of runs, their names under runs/, or experiments.",
            autocompletion=runs_and_yamls,
        ),
    ],
    json: Json = False,
) -> None:
    """Runs side by side: settings that differ, curves by tokens and by time, figures; as text, CSV and a page.

    Settings that change results stand apart from those that do not. Runs need not be finished.
    """
    from plmsae_cli.cli.compare import compare_runs

    raise typer.Exit(compare_runs(targets, json))


@verb()
def report(
    root: Root = Path("runs"),
    json: Json = False,
) -> None:
    """One page of all runs under ROOT: a table that sorts, with a link to the page of each.

    It is ROOT/index.html, one file that loads nothing. Of a single run, its page is made anew.
    """
    from plmsae_cli.cli.index import report_root

    raise typer.Exit(report_root(root, json))
