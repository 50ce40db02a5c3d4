"""`plmsae`: the verbs, wired. Nothing heavier than typer is imported before a verb needs it."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from plmsae_cli import __version__
from plmsae_cli.cli.help import Verb, Verbs
from plmsae_cli.cli.options import Bugfix, DryRun, Json, NoProgress, Restart, Sets, Tasks, WithInputs, Yes

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
_stage_verb = partial(app.command, cls=Verb, rich_help_panel="Stages, in pipeline order")
_run_verb = partial(app.command, cls=Verb, rich_help_panel="All stages")
_tool_verb = partial(app.command, cls=Verb, rich_help_panel="Tools")

YamlFile = Annotated[Path, typer.Argument(metavar="YAML", help="The experiment.")]
Targets = Annotated[
    list[Path],
    typer.Argument(metavar="YAML|FOLDER...", help="Experiments; of a folder, the YAML files at its top."),
]


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


def _stage(
    name: str,
    path: Path,
    sets: list[str] | None,
    dry: bool,
    bugfix: bool,
    as_json: bool,
    plain: bool,
    inputs: bool,
    restart: bool,
    yes: bool,
    tasks: str | None = None,
) -> None:
    from plmsae_cli.cli.stage import run_stage

    raise typer.Exit(run_stage(name, path, sets, dry, bugfix, as_json, plain, inputs, restart, tasks, yes))


@_stage_verb()
def embed(
    yaml: YamlFile,
    set_: Sets = None,
    dry_run: DryRun = False,
    bugfix: Bugfix = False,
    json: Json = False,
    no_progress: NoProgress = False,
    tasks: Tasks = None,
    yes: Yes = False,
) -> None:
    """Proteins (FASTA) to the language model's activations: one row of numbers for each residue.

    Each wanted layer becomes a folder embed-KEY under data_root, with the proteins, their split into training and
    held-out ones, and statistics. KEY is a hash of the proteins, the model and the layer: what exists is not made
    again.
    """
    _stage("embed", yaml, set_, dry_run, bugfix, json, no_progress, False, False, yes, tasks)


@_stage_verb()
def shuffle(
    yaml: YamlFile,
    set_: Sets = None,
    dry_run: DryRun = False,
    bugfix: Bugfix = False,
    json: Json = False,
    no_progress: NoProgress = False,
    with_inputs: WithInputs = False,
    tasks: Tasks = None,
    yes: Yes = False,
) -> None:
    """Activations to one random order over all rows.

    Training wants neighbouring rows from different proteins. The order is a function of shuffle.seed alone.
    """
    _stage("shuffle", yaml, set_, dry_run, bugfix, json, no_progress, with_inputs, False, yes, tasks)


@_stage_verb()
def optimize(
    yaml: YamlFile,
    set_: Sets = None,
    dry_run: DryRun = False,
    bugfix: Bugfix = False,
    json: Json = False,
    no_progress: NoProgress = False,
    with_inputs: WithInputs = False,
    tasks: Tasks = None,
    yes: Yes = False,
) -> None:
    """Shuffled rows to a dataset that training streams, from disk or S3.

    The result is a folder optimize-KEY of LitData chunks. Others can train from it alone (train.data).
    """
    _stage("optimize", yaml, set_, dry_run, bugfix, json, no_progress, with_inputs, False, yes, tasks)


@_stage_verb()
def train(
    yaml: YamlFile,
    set_: Sets = None,
    dry_run: DryRun = False,
    bugfix: Bugfix = False,
    json: Json = False,
    no_progress: NoProgress = False,
    with_inputs: WithInputs = False,
    restart: Restart = False,
    yes: Yes = False,
) -> None:
    """Dataset to a sparse autoencoder, or FASTA to a language model (train.kind).

    Checkpoints, metrics and the model go to ROOT/NAME. Starting again continues from the newest checkpoint.
    """
    _stage("train", yaml, set_, dry_run, bugfix, json, no_progress, with_inputs, restart, yes)


@_stage_verb()
def sweep(
    yaml: YamlFile,
    set_: Sets = None,
    dry_run: DryRun = False,
    bugfix: Bugfix = False,
    json: Json = False,
    no_progress: NoProgress = False,
    with_inputs: WithInputs = False,
    restart: Restart = False,
    yes: Yes = False,
) -> None:
    """Many trainings on one dataset: every combination of sweep.grid, every SAE of train.saes.

    Each is a run of its own in ROOT/NAME/trials, and is evaluated too if there is an eval section. SAEs of
    train.saes, or with sweep.stream: shared all that can, train side by side while the dataset is read once.
    """
    _stage("sweep", yaml, set_, dry_run, bugfix, json, no_progress, with_inputs, restart, yes)


@_stage_verb(
    epilog="""
    plmsae eval my.yaml                  measure
    plmsae eval a.yaml b.yaml --compare  show what was measured side by side
    """
)
def eval(
    yamls: Annotated[list[Path], typer.Argument(metavar="YAML...", help="The experiment; several with --compare.")],
    set_: Sets = None,
    dry_run: DryRun = False,
    bugfix: Bugfix = False,
    json: Json = False,
    no_progress: NoProgress = False,
    with_inputs: WithInputs = False,
    yes: Yes = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="A table, a CSV and a page of finished evaluations; measures nothing.")
    ] = False,
) -> None:
    """What the dictionary has learnt: figures, a table of latents and an HTML report.

    Results are in ROOT/NAME/eval, the page in ROOT/NAME/report/index.html.
    """
    if compare:
        from plmsae_cli.cli.compare import compare_files

        if dry_run or bugfix or with_inputs:
            raise typer.BadParameter("it shows what exists: leave out the other options", param_hint="--compare")
        raise typer.Exit(compare_files(yamls, set_, json))
    if len(yamls) > 1:
        raise typer.BadParameter(
            "one experiment, or several with --compare; `plmsae run` takes many", param_hint="YAML"
        )
    _stage("eval", yamls[0], set_, dry_run, bugfix, json, no_progress, with_inputs, False, yes)


@_run_verb(
    epilog="""
    plmsae run my.yaml                        all stages of one experiment
    plmsae run my.yaml --dry-run              the plan, with sizes
    plmsae run my.yaml --set train.sae.k=32   with another value, once
    plmsae run experiments/                   a queue
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
) -> None:
    """Every stage of each experiment, in order; what is done already is skipped.

    All files are checked before anything runs, then they run one after the other, by name. One that fails does not
    stop the next. Files dropped into a FOLDER while it runs are picked up; folders below it are left alone.
    """
    from plmsae_cli.cli.run import run_files

    raise typer.Exit(run_files(targets, set_, dry_run, bugfix, json, no_progress, restart, yes))


@_tool_verb()
def init(
    path: Annotated[Path, typer.Argument(metavar="YAML", help="The file to write.")],
    kind: Annotated[
        str,
        typer.Option(metavar="KIND", help="sae: sparse autoencoder; plm: language model; sweep: many autoencoders."),
    ] = "sae",
    full: Annotated[bool, typer.Option("--full", help="Every field there is, with its help.")] = False,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="OLD", help="Convert another tool's settings instead: a YAML of SpeedrunningPLMs."
        ),
    ] = None,
) -> None:
    """Write a commented experiment to begin with; never over a file that exists."""
    from plmsae_cli.cli.tools import write_converted, write_template

    if source is not None:
        if full or kind != "sae":
            raise typer.BadParameter("it decides the kind: leave out --kind and --full", param_hint="--from")
        raise typer.Exit(write_converted(path, source))
    raise typer.Exit(write_template(path, kind, full))


@_tool_verb()
def validate(
    targets: Targets,
    set_: Sets = None,
    bugfix: Bugfix = False,
    json: Json = False,
) -> None:
    """Check everything that can be known without running: fields, inputs, sizes, disk space."""
    from plmsae_cli.cli.tools import validate_files

    raise typer.Exit(validate_files(targets, set_, bugfix, json))


@_tool_verb()
def ls(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of runs; runs/ unless named.")] = Path("runs"),
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


@_tool_verb(
    epilog="""
    plmsae export first --csv first.csv                          the concepts of each latent
    plmsae export runs/my-plm --hf my-plm-hf                     a folder for transformers
    plmsae export runs/my-plm --hf my-plm-hf --push owner/model  and upload it
    """
)
def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run; with --hf a language model's, or what model.weights may be.")
    ],
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write what its latents are about, as CSV.")
    ] = None,
    parquet: Annotated[
        Path | None, typer.Option("--parquet", metavar="FILE", help="The same table as Parquet.")
    ] = None,
    hf: Annotated[
        Path | None, typer.Option("--hf", metavar="FOLDER", help="The Hugging Face folder to write: new or empty.")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            "--push", metavar="NAME", help="Also upload it to the Hugging Face hub, as a private OWNER/MODEL."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write a run in another form: the concepts of its latents as a table, or a language model for transformers.

    The table has a row a latent and concept, with its scores, density, family and description. ESM-2 runs become a plain
    EsmForMaskedLM with the same logits; UNet runs bring their code, for trust_remote_code=True.
    """
    from plmsae_cli.cli.export import export_run

    raise typer.Exit(export_run(run, csv, parquet, hf, push, json))


@_tool_verb()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or its name under runs/.")],
    json: Json = False,
) -> None:
    """Show how far one run is, and what came out."""
    from plmsae_cli.cli.listing import show_status

    raise typer.Exit(show_status(run, json))


@_tool_verb(
    epilog="""
    plmsae verify runs/data/optimize-KEY    one artifact
    plmsae verify exp.yaml                  what an experiment has made
    plmsae verify runs                      everything below a folder
    """
)
def verify(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="PATH|YAML...", help="Artifacts, local or s3://; folders of them; experiments."),
    ],
    json: Json = False,
) -> None:
    """Read finished data again and compare every file with the hash recorded when it was written.

    A damaged file is named, with the task that made it and how to make it again. Exit code 1 if there is one. For
    data in a bucket that needs settings, name the experiment.
    """
    from plmsae_cli.cli.housekeeping import verify_targets

    raise typer.Exit(verify_targets(targets, json))


@_tool_verb()
def clean(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of runs; runs/ unless named.")] = Path("runs"),
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

    What a run points to, and what is being written, is never on the list. `--yes` deletes it, manifests first.
    """
    from plmsae_cli.cli.housekeeping import clean_root

    raise typer.Exit(clean_root(root, yes, older, unused, json))


@_tool_verb(
    epilog="""
    plmsae browse runs/first                      open its pages in a browser
    plmsae browse runs/first runs/small           two dictionaries side by side
    plmsae browse runs/first --build pages        a folder that opens from disk
    """
)
def browse(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="One or two runs: folders, or names under runs/.")
    ],
    build: Annotated[
        Path | None, typer.Option("--build", metavar="FOLDER", help="Write the pages there, and serve nothing.")
    ] = None,
    structures: Annotated[
        list[str] | None,
        typer.Option(
            "--structures", metavar="PATH", help="PDB or mmCIF file (file:CHAIN), or a folder of them; repeatable."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="HOST", help="Where to listen; beyond this machine a token is asked for.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="8642 unless set; 0 takes a free one.")
    ] = 8642,
    no_open: Annotated[bool, typer.Option("--no-open", help="Print the address only.")] = False,
) -> None:
    """Pages of a run's latents: examples, concepts, neighbours, structures; own sequences too.

    Needs what `eval.features` leaves. Pages are built once, in RUN/browse, and again when the run has changed.
    """
    from plmsae_cli.cli.browse import browse_runs

    raise typer.Exit(browse_runs(runs, build, structures or [], host, port, no_open))


@_tool_verb()
def schema() -> None:
    """Print the JSON schema of experiments, for editors."""
    from plmsae_cli.config.schema import text

    sys.stdout.write(text())


def main() -> None:
    """Entry point of `plmsae`."""
    # Threads that wait give their core away: on a shared machine spinning costs more than it saves. Read as torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
