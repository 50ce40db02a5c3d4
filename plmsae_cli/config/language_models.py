"""Axes of `eval` that are about language models, and need no autoencoder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from plmsae_cli.config.base import SCIENCE, Auto, Count, Positive, Rate, Section, Whole, rule

TRAINED = "trained"
"""Word for the language model that the experiment itself trains."""
NAMED_TASKS = ("secondary_structure", "transmembrane", "localisation")
"""What `representations` makes of annotations."""


class LanguageModels(Section):
    """How well language models predict masked residues: loss, perplexity, accuracy, precision, recall, F1 and MCC of several
    models on the same masks. Needs no autoencoder."""

    models: Annotated[list[str], Field(min_length=1)] | None = None
    """What `model.weights` may be, several of it; run folders; `trained` for the one that this experiment trains. Default:
    that one, else `model.weights`."""
    bin: str | list[str] | None = None
    """Proteins to score on: token shards (`.bin`) by path or glob, local or `s3://`. Known by content."""
    fasta: str | None = None
    """Proteins to score on, instead of `bin`: FASTA, UniProtKB table or flat file. Known by content."""
    sequences: Annotated[Count | None, SCIENCE] = 10_000
    """How many at most, the first; null takes all."""
    mask_rate: Annotated[Rate, SCIENCE] = 0.15
    """Share of the residues masked (100 % <mask>), by a hash of the sequence and position."""
    max_length: Annotated[Count, SCIENCE] = 1022
    """Longer proteins are cut to so many residues."""
    compute: Annotated[Auto | Literal["float32", "bfloat16", "float16"], SCIENCE] = "auto"
    """Arithmetic of the models; weights stay float32. `auto` is bfloat16 on GPUs that have it, float32 on CPUs."""
    tasks: Count = 1
    """Pieces that the proteins are cut into for each model, for several GPUs or machines; the figures are the same."""
    batch_tokens: Count = 8192
    """Residues of one forward pass."""

    @model_validator(mode="after")
    def _one_source(self) -> LanguageModels:
        if (self.fasta is None) == (self.bin is None):
            given = "both are given" if self.fasta is not None else "neither is given"
            raise rule("fasta", f"proteins come from fasta or from bin: {given}", "name one of the two")
        return self.require_each_once("models")


class Representations(Section):
    """What can be read off a language model's layers: frozen embeddings, mean-pooled or by residue, and linear probes on tasks
    with fixed splits, one score a layer; the best on validation is scored on test. Needs no autoencoder."""

    models: Annotated[list[str], Field(min_length=1)] | None = None
    """As in `lm`."""
    tasks: Annotated[Annotated[list[str], Field(min_length=1)], SCIENCE]
    """`secondary_structure`, `transmembrane` (by residue), `localisation` (by protein): from `annotations`; or CSV and TSV
    files of `sequence,label`, plain or gzip, known by content: numbers are regressed, words are classes."""
    annotations: str | None = None
    """Annotated proteins for the named tasks: a UniProtKB table (TSV) or flat file, plain or gzip. Known by content."""
    layers: Annotated[Literal["all"] | list[Whole], SCIENCE] = "all"
    """Which layers are probed, where a model has them."""
    clusters: Annotated[Literal["auto", "mmseqs", "kmer", "hash"], SCIENCE] = "auto"
    """What no split cuts: 30 % identity clusters of `mmseqs`, rough ones by shared 5-mers (`kmer`), or nothing (`hash`);
    `auto` is mmseqs where it is installed, else hash."""
    proteins: Annotated[Count | None, SCIENCE] = 5000
    """Proteins of a task at most, those with the smallest hashes; null takes all."""
    residues: Annotated[Count, SCIENCE] = 20_000
    """Residues of a task by residue at most, whole proteins."""
    min_proteins: Annotated[Count, SCIENCE] = 10
    """A class that fewer proteins have is left out."""
    max_length: Annotated[Count, SCIENCE] = 1022
    """Longer proteins are left out."""
    l2: Annotated[Annotated[list[Positive], Field(min_length=1)], SCIENCE] = [1.0, 30.0, 1000.0]
    """Penalties on the probes' squared weights; the best on validation is taken, for each layer."""
    compute: Annotated[Auto | Literal["float32", "float16", "bfloat16"], SCIENCE] = "auto"
    """Number type of the models, as in `embed`."""
    batch_tokens: Auto | Count = "auto"
    """Tokens of one forward pass."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Representations:
        if not self.layers:
            raise rule("layers", "layers is an empty list", "name at least one, or write `all`")
        named = [task for task in self.tasks if task in NAMED_TASKS]
        for task in self.tasks:
            if task not in NAMED_TASKS and not task.removesuffix(".gz").endswith((".csv", ".tsv")):
                raise rule(
                    "tasks", f"{task} is no task and no CSV file", f"one of: {', '.join(NAMED_TASKS)}; or a path"
                )
        if named and self.annotations is None:
            raise rule("annotations", f"{named[0]} needs annotated proteins", "add annotations: a UniProtKB file")
        if self.annotations is not None and not named:
            raise rule("annotations", "annotations has no effect: no named task", "remove it")
        return self.require_each_once("models", "tasks", "layers", "l2")
