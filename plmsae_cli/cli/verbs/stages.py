"""The six stages, in pipeline order."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plmsae_cli.cli.options import Bugfix, DryRun, Json, NoProgress, Restart, Sets, Tasks, Wishes, WithInputs, Yes
from plmsae_cli.cli.verbs.group import YamlFile, group

verbs, verb = group("Stages, in pipeline order")


def _stage(name: str, path: Path, wishes: Wishes) -> None:
    from plmsae_cli.cli.stage import run_stage

    raise typer.Exit(run_stage(name, path, wishes))


@verb()
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
    wishes = Wishes(set_, dry_run, bugfix, json, no_progress, tasks=tasks, yes=yes)
    _stage("embed", yaml, wishes)


@verb()
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
    wishes = Wishes(set_, dry_run, bugfix, json, no_progress, with_inputs=with_inputs, tasks=tasks, yes=yes)
    _stage("shuffle", yaml, wishes)


@verb()
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
    wishes = Wishes(set_, dry_run, bugfix, json, no_progress, with_inputs=with_inputs, tasks=tasks, yes=yes)
    _stage("optimize", yaml, wishes)


@verb()
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
    wishes = Wishes(set_, dry_run, bugfix, json, no_progress, with_inputs=with_inputs, restart=restart, yes=yes)
    _stage("train", yaml, wishes)


@verb()
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
    """Many trainings on one dataset: a grid, a random search or Optuna's, every SAE of train.saes.

    Each is a run of its own in ROOT/NAME/trials, and is evaluated too if there is an eval section. SAEs of
    train.saes, or with sweep.stream: shared all that can, train side by side while the dataset is read once.
    """
    wishes = Wishes(set_, dry_run, bugfix, json, no_progress, with_inputs=with_inputs, restart=restart, yes=yes)
    _stage("sweep", yaml, wishes)


@verb(
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
    _stage("eval", yamls[0], Wishes(set_, dry_run, bugfix, json, no_progress, with_inputs=with_inputs, yes=yes))
