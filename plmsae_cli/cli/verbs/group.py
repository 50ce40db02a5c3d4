"""What groups of verbs share: how one is registered, and arguments that several have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from plmsae_cli.cli.completion import runs, yamls
from plmsae_cli.cli.help import Verb

YamlFile = Annotated[Path, typer.Argument(metavar="YAML", help="The experiment.", autocompletion=yamls)]
Targets = Annotated[
    list[Path],
    typer.Argument(
        metavar="YAML|FOLDER...",
        help="Experiments; of a folder, the YAML files at its top.",
        autocompletion=yamls,
    ),
]
Root = Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of runs; runs/ unless named.")]
Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run's folder, or its name under runs/.", autocompletion=runs)
]

Register = Callable[..., Callable[..., Any]]


def group(title: str) -> tuple[typer.Typer, Register]:
    """Verbs under one heading of the first help page: where they are kept, and the decorator that adds one."""
    verbs = typer.Typer()
    return verbs, partial(verbs.command, cls=Verb, rich_help_panel=title)
