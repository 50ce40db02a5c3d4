"""Experiment files: write one, check some, their schema."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from plmsae_cli.cli.completion import kinds
from plmsae_cli.cli.options import Bugfix, Json, Sets
from plmsae_cli.cli.verbs.group import Targets, group

verbs, verb = group("Tools")


@verb()
def init(
    path: Annotated[Path, typer.Argument(metavar="YAML", help="The file to write.")],
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            autocompletion=kinds,
            help="sae: sparse autoencoder; plm: language model; sweep: a grid of autoencoders; search: the best settings,"
            " by Optuna; imported: an autoencoder on activations of another program.",
        ),
    ] = "sae",
    full: Annotated[bool, typer.Option("--full", help="Every field there is, with its help.")] = False,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="OLD",
            help="Convert another tool's settings instead: of SAELens, dictionary_learning or SpeedrunningPLMs.",
        ),
    ] = None,
) -> None:
    """Write a commented experiment to begin with; never over a file that exists."""
    from plmsae_cli.cli.experiments import write_converted, write_template

    if source is not None:
        if full or kind != "sae":
            raise typer.BadParameter("it decides the kind: leave out --kind and --full", param_hint="--from")
        raise typer.Exit(write_converted(path, source))
    raise typer.Exit(write_template(path, kind, full))


@verb()
def validate(
    targets: Targets,
    set_: Sets = None,
    bugfix: Bugfix = False,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", help="Also ask the outside: buckets, memory of the GPUs here, room on disks, W&B's login."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Check everything that can be known without running: fields, inputs, sizes, disk space."""
    from plmsae_cli.cli.experiments import validate_files

    raise typer.Exit(validate_files(targets, set_, bugfix, json, deep))


@verb()
def schema() -> None:
    """Print the JSON schema of experiments, for editors."""
    from plmsae_cli.config.schema import text

    sys.stdout.write(text())
