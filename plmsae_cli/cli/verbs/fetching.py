"""Published inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plmsae_cli.cli.completion import sources
from plmsae_cli.cli.options import Json, NoProgress
from plmsae_cli.cli.verbs.group import group

verbs, verb = group("Tools")


@verb(
    epilog="""
    plmsae fetch                                what there is
    plmsae fetch uniref50 swissprot             proteins, annotations
    plmsae fetch omg_prot50 --num-chunks 10     a billion tokens
    plmsae fetch esm2_t33_650M_UR50D            weights, where model.weights looks for them
    """
)
def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="What to fetch; without a name, the list.", autocompletion=sources),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Where to; data/, for weights the cache, unless set.")
    ] = None,
    num_chunks: Annotated[
        int, typer.Option("--num-chunks", metavar="N", min=0, help="Training files of omg_prot50; 10 unless set.")
    ] = 10,
    mirror: Annotated[
        str | None,
        typer.Option("--mirror", metavar="URL", help="Take every published HOST/PATH from below URL (PLMSAE_MIRROR)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and their sizes; fetch nothing.")] = False,
    json: Json = False,
    no_progress: NoProgress = False,
) -> None:
    """Download published proteins, annotations, tokens and weights; sizes are shown first.

    What is there is not fetched again, what was cut short goes on, and checksums are verified where publishers give
    them.
    """
    from plmsae_cli.cli.fetch import fetch_names

    raise typer.Exit(fetch_names(names or [], to, num_chunks, mirror, dry_run, json, no_progress))
