"""A run for others: its tables, its model, its pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plmsae_cli.cli.options import Json
from plmsae_cli.cli.verbs.group import group

verbs, verb = group("Tools")


@verb(
    epilog="""
    plmsae export first --csv first.csv                          the concepts of each latent
    plmsae export runs/my-plm --hf my-plm-hf                     a folder for transformers
    plmsae export runs/my-plm --hf my-plm-hf --push owner/model  and upload it
    plmsae export first --saelens first-saelens                  its dictionary for SAELens
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
    saelens: Annotated[
        Path | None,
        typer.Option("--saelens", metavar="FOLDER", help="The folder for SAELens to write: new or empty."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            "--push", metavar="NAME", help="Also upload that folder to the Hugging Face hub, as a private OWNER/MODEL."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write a run in another form: the concepts of its latents as a table, its dictionary for SAELens, or a language model for
    transformers.

    The table has a row a latent and concept, with its scores, density, family and description. ESM-2 runs become a plain
    EsmForMaskedLM with the same logits; UNet runs bring their code, for trust_remote_code=True.
    """
    from plmsae_cli.cli.export import export_run

    raise typer.Exit(export_run(run, csv, parquet, hf, saelens, push, json))


@verb(
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
