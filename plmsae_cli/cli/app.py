"""`plmsae`: the groups of verbs, wired. Nothing heavier than typer is imported before a verb needs it."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Annotated

import typer

from plmsae_cli import __version__
from plmsae_cli.cli.completion import BASH
from plmsae_cli.cli.help import Verbs
from plmsae_cli.cli.streams import steady_streams
from plmsae_cli.cli.verbs import comparing, data, experiments, fetching, looking, machine, run, showing, stages

with suppress(ImportError, AttributeError):  # typer has no public place for it; without it bash gets typer's own
    from typer import _completion_shared

    _completion_shared._completion_scripts["bash"] = BASH

app = typer.Typer(
    name="plmsae",
    cls=Verbs,
    help="""
    From proteins to interpretable features of a protein language model.

    One YAML file describes an experiment. `plmsae init my.yaml` writes one to begin with, `plmsae validate my.yaml`
    checks it, `plmsae run my.yaml` does all of it. `plmsae VERB --help` explains a verb.
    """,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    subcommand_metavar="VERB ...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

# The first help page shows them in this order.
for each in (stages, run, fetching, experiments, looking, comparing, showing, data, machine):
    app.registered_commands += each.verbs.registered_commands


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"plmsae {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the verb."""


def main() -> None:
    """Entry point of `plmsae`."""
    # Threads that wait give their core away: on a shared machine spinning costs more than it saves. Read as torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    steady_streams()
    app()
