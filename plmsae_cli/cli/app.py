"""`plmsae`: the verbs, wired. Nothing heavier than typer is imported before a verb needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from plmsae_cli.cli.exits import EPILOG
from plmsae_cli.cli.options import Bugfix, DryRun, Json, NoProgress, Restart, Sets, WithInputs

STAGES_PANEL = "Stages, in pipeline order"
RUN_PANEL = "Everything"
TOOLS_PANEL = "Tools"

app = typer.Typer(
    name="plmsae",
    help="From proteins to interpretable features: one YAML an experiment.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

YamlFile = Annotated[Path, typer.Argument(metavar="YAML", help="The experiment.", show_default=False)]


def _stage(
    name: str, path: Path, sets: list[str] | None, dry: bool, bugfix: bool, as_json: bool, plain: bool, inputs: bool, restart: bool
) -> None:
    from plmsae_cli.cli.stage import run_stage

    raise typer.Exit(run_stage(name, path, sets, dry, bugfix, as_json, plain, inputs, restart))


@app.command(rich_help_panel=STAGES_PANEL)
def embed(
    yaml: YamlFile,
    set_: Sets = None,
    dry_run: DryRun = False,
    bugfix: Bugfix = False,
    json: Json = False,
    no_progress: NoProgress = False,
) -> None:
    """FASTA to language-model activations, one row a residue."""
    _stage("embed", yaml, set_, dry_run, bugfix, json, no_progress, False, False)


@app.command(rich_help_panel=STAGES_PANEL)
def shuffle(
    yaml: YamlFile,
    set_: Sets = None,
    dry_run: DryRun = False,
    bugfix: Bugfix = False,
    json: Json = False,
    no_progress: NoProgress = False,
    with_inputs: WithInputs = False,
) -> None:
    """Activations to one global random order."""
    _stage("shuffle", yaml, set_, dry_run, bugfix, json, no_progress, with_inputs, False)


@app.command(rich_help_panel=STAGES_PANEL)
def optimize(
    yaml: YamlFile,
    set_: Sets = None,
    dry_run: DryRun = False,
    bugfix: Bugfix = False,
    json: Json = False,
    no_progress: NoProgress = False,
    with_inputs: WithInputs = False,
) -> None:
    """Shuffled rows to a streamable dataset (LitData chunks)."""
    _stage("optimize", yaml, set_, dry_run, bugfix, json, no_progress, with_inputs, False)


@app.command(rich_help_panel=STAGES_PANEL)
def train(
    yaml: YamlFile,
    set_: Sets = None,
    dry_run: DryRun = False,
    bugfix: Bugfix = False,
    json: Json = False,
    no_progress: NoProgress = False,
    with_inputs: WithInputs = False,
    restart: Restart = False,
) -> None:
    """Dataset to a trained sparse autoencoder, or FASTA to a language model."""
    _stage("train", yaml, set_, dry_run, bugfix, json, no_progress, with_inputs, restart)


@app.command(rich_help_panel=STAGES_PANEL)
def sweep(
    yaml: YamlFile,
    set_: Sets = None,
    dry_run: DryRun = False,
    bugfix: Bugfix = False,
    json: Json = False,
    no_progress: NoProgress = False,
    with_inputs: WithInputs = False,
    restart: Restart = False,
) -> None:
    """Many trainings on one dataset."""
    _stage("sweep", yaml, set_, dry_run, bugfix, json, no_progress, with_inputs, restart)


@app.command(rich_help_panel=STAGES_PANEL)
def eval(
    yaml: YamlFile,
    set_: Sets = None,
    dry_run: DryRun = False,
    bugfix: Bugfix = False,
    json: Json = False,
    no_progress: NoProgress = False,
    with_inputs: WithInputs = False,
) -> None:
    """Evidence of what a dictionary has learnt, ending in an HTML report."""
    _stage("eval", yaml, set_, dry_run, bugfix, json, no_progress, with_inputs, False)


@app.command(rich_help_panel=RUN_PANEL)
def run(
    targets: Annotated[
        list[Path], typer.Argument(metavar="YAML|FOLDER...", help="Experiments, or folders of them.", show_default=False)
    ],
    set_: Sets = None,
    dry_run: DryRun = False,
    bugfix: Bugfix = False,
    json: Json = False,
    no_progress: NoProgress = False,
    restart: Restart = False,
) -> None:
    """Every stage of each experiment, in order; folders are queues."""
    from plmsae_cli.cli.run import run_files

    raise typer.Exit(run_files(targets, set_, dry_run, bugfix, json, no_progress, restart))


@app.command(rich_help_panel=TOOLS_PANEL)
def init(
    path: Annotated[Path, typer.Argument(metavar="YAML", help="File to write.", show_default=False)],
    kind: Annotated[str, typer.Option(help="sae, plm or sweep.")] = "sae",
    full: Annotated[bool, typer.Option("--full", help="Every field, with its help.")] = False,
) -> None:
    """Write a commented experiment to begin with."""
    from plmsae_cli.cli.tools import write_template

    raise typer.Exit(write_template(path, kind, full))


@app.command(rich_help_panel=TOOLS_PANEL)
def validate(
    targets: Annotated[
        list[Path], typer.Argument(metavar="YAML|FOLDER...", help="Experiments, or folders of them.", show_default=False)
    ],
    set_: Sets = None,
    bugfix: Bugfix = False,
    json: Json = False,
) -> None:
    """Everything that can be known without running: fields, inputs, shapes, disk space."""
    from plmsae_cli.cli.tools import validate_files

    raise typer.Exit(validate_files(targets, set_, bugfix, json))


@app.command(rich_help_panel=TOOLS_PANEL)
def ls(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of runs.")] = Path("runs"),
    json: Json = False,
) -> None:
    """Runs and the data they use."""
    from plmsae_cli.cli.listing import list_root

    raise typer.Exit(list_root(root, json))


@app.command(rich_help_panel=TOOLS_PANEL)
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or its name under runs/.", show_default=False)],
    json: Json = False,
) -> None:
    """How far one run is, and what came out."""
    from plmsae_cli.cli.listing import show_status

    raise typer.Exit(show_status(run, json))


@app.command(rich_help_panel=TOOLS_PANEL)
def schema() -> None:
    """The JSON schema of experiments, for editors."""
    from plmsae_cli.config.schema import text

    sys.stdout.write(text())


def main() -> None:
    """Entry point of `plmsae`."""
    app()
