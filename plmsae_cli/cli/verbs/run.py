"""All stages, of one experiment or many."""

from __future__ import annotations

from typing import Annotated

import typer

from plmsae_cli.cli.options import Bugfix, DryRun, Json, NoProgress, Restart, Sets, Wishes, Yes
from plmsae_cli.cli.verbs.group import Targets, group

verbs, verb = group("All stages")


@verb(
    epilog="""
    plmsae run my.yaml                        all stages of one experiment
    plmsae run my.yaml --dry-run              the plan, with sizes
    plmsae run my.yaml --set train.sae.k=32   with another value, once
    plmsae run experiments/                   a queue
    plmsae run experiments/ --watch           a queue that waits for more
    """
)
def run(
    targets: Targets,
    set_: Sets = None,
    dry_run: DryRun = False,
    bugfix: Bugfix = False,
    json: Json = False,
    no_progress: NoProgress = False,
    restart: Restart = False,
    yes: Yes = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="When all is done, wait for further files in FOLDER, until Ctrl-C.")
    ] = False,
) -> None:
    """Every stage of each experiment, in order; what is done already is skipped.

    All files are checked before anything runs, then they run one after the other, by name. One that fails does not
    stop the next. Files dropped into a FOLDER while it runs are picked up; folders below it are left alone.
    """
    from plmsae_cli.cli.run import run_files

    wishes = Wishes(set_, dry_run, bugfix, json, no_progress, restart=restart, yes=yes, watch=watch)
    raise typer.Exit(run_files(targets, wishes))
