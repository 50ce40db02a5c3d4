"""Finished data: check it, give up what no longer serves."""

from __future__ import annotations

from typing import Annotated

import typer

from plmsae_cli.cli.options import Json
from plmsae_cli.cli.verbs.group import group

verbs, verb = group("Tools")


@verb(
    epilog="""
    plmsae verify runs/data/optimize-KEY    one artifact
    plmsae verify exp.yaml                  what an experiment has made
    plmsae verify runs                      everything below a folder
    """
)
def verify(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="PATH|YAML...", help="Artifacts, local or s3://; runs; folders of them; experiments."),
    ],
    json: Json = False,
) -> None:
    """Read finished data again and compare every file with the hash recorded when it was written.

    A damaged file is named, with the task that made it and how to make it again. Exit code 1 if there is one. For
    data in a bucket that needs settings, name the experiment.
    """
    from plmsae_cli.cli.housekeeping import verify_targets

    raise typer.Exit(verify_targets(targets, json))


@verb()
def clean(
    root: Annotated[
        str,
        typer.Argument(
            metavar="ROOT|YAML", help="A folder, local or s3://, or an experiment's data; runs/ unless named."
        ),
    ] = "runs",
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed. Without it nothing is touched.")] = False,
    older: Annotated[
        float,
        typer.Option(
            "--older", metavar="HOURS", help="Leave alone what was written to in the last HOURS; 24 unless set."
        ),
    ] = 24.0,
    unused: Annotated[
        bool,
        typer.Option("--unused", help="Also finished data that no run under ROOT uses; runs elsewhere are not known."),
    ] = False,
    json: Json = False,
) -> None:
    """List what no longer serves: writes that were cut short, files of lost attempts, rests of freed data.

    What a run points to, and what is being written, is never on the list. `--yes` deletes it, manifests first. In a
    bucket also uploads that were never completed, which no other listing shows and which are billed.
    """
    from plmsae_cli.cli.housekeeping import clean_root

    raise typer.Exit(clean_root(root, yes, older, unused, json))
