"""The machine itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plmsae_cli.cli.options import Json
from plmsae_cli.cli.verbs.group import group

verbs, verb = group("Tools")


@verb()
def doctor(
    yaml: Annotated[
        Path | None,
        typer.Argument(metavar="YAML", help="Look at the folders, buckets and services of this experiment."),
    ] = None,
    json: Json = False,
) -> None:
    """Try what experiments rest on: driver and GPUs, ranks that sum, disks, buckets, memory, W&B.

    Writes and deletes 128 MB on each disk, and an object in each bucket. Exit code 1 if a check fails.
    """
    from plmsae_cli.cli.doctor import examine

    raise typer.Exit(examine(yaml, json))
