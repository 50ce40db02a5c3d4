"""The `eval` section: which axes of evidence are measured, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from plmsae_cli.config.base import (
    ADDED,
    SCIENCE,
    Auto,
    Bytes,
    Count,
    Fraction,
    Positive,
    Rate,
    Section,
    Whole,
    rule,
)
from plmsae_cli.config.features import Features
from plmsae_cli.config.language_models import LanguageModels, Representations
from plmsae_cli.config.structure import Structure


class Fidelity(Section):
    """How faithful the reconstruction is: FVU, cosine, L0, dead and density on held-out residues, and how much of
    the language model's loss survives the splice."""

    loss_recovered: Annotated[bool, SCIENCE] = True
    """Also run the language model with the reconstruction spliced in (needs `model` and the held-out sequences)."""
    mask_rate: Annotated[Rate, SCIENCE] = 0.15
    """Share of the residues masked, by a hash of the sequence and position: the same masks for every SAE."""
    proteins: Annotated[Count | None, SCIENCE] = 1000
    """Held-out proteins whose loss is measured; null takes all."""
    batch_tokens: Auto | Count = "auto"
    """Tokens of one forward pass."""


Null = Literal["residual", "pca", "random_model", "shuffled"]


class Concepts(Section):
    """Which latents find what UniProt annotates: precision and recall of each latent for each concept, the pair chosen on
    one half of the proteins and scored on the other."""

    annotations: str
    """Annotated proteins: a UniProtKB table (TSV) or flat file, plain or gzip, local or `s3://`. Known by content."""
    mode: Annotated[Literal["strict", "interplm_compat"], SCIENCE] = "strict"
    """`strict`, or `interplm_compat`: labels from notes alone, numbered repeats apart, the threshold chosen again on
    test, training proteins kept; to repeat published numbers."""
    min_instances: Annotated[Count, SCIENCE] = 100
    """Instances that make a label a concept; less for small sets."""
    keep_instances: Annotated[Whole, SCIENCE] = 25
    """A concept is scored with more instances than this in both halves together, or more residues than keep_residues."""
    keep_residues: Annotated[Whole, SCIENCE] = 1500
    """See keep_instances."""
    max_length: Annotated[Count, SCIENCE] = 1022
    """Longer proteins are left out: cut ones would have cut instances."""
    split: Annotated[Auto | Literal["cluster", "random"], SCIENCE] = "auto"
    """Halves by cluster of similar sequences, or each protein by itself; `auto` is `cluster` in `strict`, else `random`."""
    clusters: Annotated[Auto | Literal["mmseqs", "kmer"], SCIENCE] = "auto"
    """`mmseqs`: 30 % identity over 80 % of both, `kmer`: shared 5-mers; `auto` is `mmseqs` where it is installed."""
    nulls: Annotated[list[Null], SCIENCE] = ["residual", "pca", "random_model", "shuffled"]
    """What the dictionary is compared with: the residual stream's dimensions and its principal components, both signs
    each, the dimensions of a model with random weights, and the dictionary on labels rotated along each protein."""
    bootstraps: Annotated[Count, SCIENCE] = 1000
    """Draws of proteins for the 95 % intervals."""
    tasks: Count = 1
    """Pieces the proteins are cut into, for several workers; results are the same for any number."""
    memory: Bytes = Field(default="8GB", validate_default=True)
    """Bytes of counts held at a time; where they do not suffice, latents are counted in several passes."""
    batch_tokens: Auto | Count = "auto"
    """Tokens of one forward pass."""

    @model_validator(mode="after")
    def _nulls_once(self) -> Concepts:
        return self.require_each_once("nulls")


class Families(Section):
    """Which latents mark families: the largest activation in each protein against protein labels, and the shape of each
    latent's activation along proteins."""

    proteins: str
    """Proteins: FASTA, UniProtKB table or flat file, plain or gzip, local or `s3://`. Known by content."""
    labels: str | None = None
    """Labels by protein: CSV or TSV, an id and a label (or several, separated by `;`) a line; null: the Pfam families
    of a UniProt file."""
    mode: Annotated[Literal["strict", "interprot_compat"], SCIENCE] = "strict"
    """`strict`: classes of the top proteins, which are then left out; `interprot_compat`: classes of the top one."""
    top: Annotated[Count, SCIENCE] = 20
    """In `strict`, the strongest train proteins that name candidate classes and are left out; less for small sets: a
    family with fewer train proteins cannot be found."""
    min_proteins: Annotated[Count, SCIENCE] = 10
    """Proteins a class needs; in `strict` a fourth of them in either half."""
    max_length: Annotated[Count, SCIENCE] = 1022
    """Longer proteins are left out."""
    clusters: Annotated[Auto | Literal["mmseqs", "kmer"], SCIENCE] = "auto"
    """As in `concepts`."""
    tasks: Count = 1
    """Pieces the proteins are cut into."""
    batch_tokens: Auto | Count = "auto"
    """Tokens of one forward pass."""


class Probes(Section):
    """What can be read off the latents linearly: logistic regression on one latent, on all, and on the activations behind
    them."""

    proteins: str
    """Proteins: FASTA, UniProtKB table or flat file. Known by content."""
    labels: str | None = None
    """Labels by protein, as in `families`; null probes the residue annotations of a UniProt file alone."""
    min_instances: Annotated[Count, SCIENCE] = 100
    """Instances (proteins, for protein labels) that a target needs."""
    targets: Annotated[Count, SCIENCE] = 50
    """Targets probed, the most frequent first."""
    residues: Annotated[Count, SCIENCE] = 100_000
    """Residues sampled, by a hash."""
    l2: Annotated[Positive, SCIENCE] = 1.0
    """Penalty l2/2 ||w||^2 beside the summed loss, on activations divided by their maximum."""
    max_length: Annotated[Count, SCIENCE] = 1022
    """Longer proteins are left out."""
    clusters: Annotated[Auto | Literal["mmseqs", "kmer"], SCIENCE] = "auto"
    """As in `concepts`; four fifths of the clusters train, one tests."""
    tasks: Count = 1
    """Pieces the proteins, then the targets, are cut into, for several workers; results are the same for any number."""
    batch_tokens: Auto | Count = "auto"
    """Tokens of one forward pass."""


class Encode(Section):
    """The dictionary applied to proteins of your own: which latents are active on which residue."""

    fasta: str
    """Proteins: FASTA, UniProtKB table or flat file. Known by content."""
    top: Annotated[Count, SCIENCE] = 10
    """Latents listed for a protein: those of the largest activation, as a share of their maximum."""
    above: Annotated[Fraction, SCIENCE] = 0.0
    """Activations are written where they are above this share of the latent's maximum."""
    max_length: Annotated[Count, SCIENCE] = 1022
    """Residues encoded of a longer protein, the first ones."""
    tasks: Count = 1
    """Pieces the proteins are cut into."""
    batch_tokens: Auto | Count = "auto"
    """Tokens of one forward pass."""


class Contacts(Section):
    """Which residues touch, as the language model's couplings tell: how much of that survives the reconstruction."""

    structures: Annotated[list[str], Field(min_length=1)]
    """Experimental structures, PDB or mmCIF, plain or gzip, local or `s3://`; `file.pdb.gz:B` is chain B, else the first chain
    of amino acids is taken. Known by content."""
    methods: Annotated[Annotated[list[Literal["jacobian", "head"]], Field(min_length=1)], SCIENCE] = ["jacobian"]
    """`jacobian`: what every substitution does to every other residue's logits, 19 forward passes a residue and variant;
    `head`: ESM-2's published regression on attention, cheap, but blind to a splice in the last layer."""
    sequence: Annotated[Literal["resolved", "seqres"], SCIENCE] = "resolved"
    """What the model reads: the residues with coordinates, or all that were in the crystal, the others then not scored."""
    max_length: Annotated[Count, SCIENCE] = 1022
    """Longer chains are refused. The Jacobian of L residues takes 1,600 L^2 bytes: 1.7 GB for 1,022."""
    compute: Annotated[Auto | Literal["float32", "float16", "bfloat16"], SCIENCE] = "auto"
    """Number type of the model; `auto` is float16 on CUDA, float32 on CPUs."""
    bootstraps: Annotated[Count, SCIENCE] = 1000
    """Draws of proteins for the 95 % intervals."""
    tasks: Count = 1
    """Pieces the structures are cut into."""
    batch_tokens: Auto | Count = "auto"
    """Tokens of one forward pass."""

    @model_validator(mode="after")
    def _each_once(self) -> Contacts:
        return self.require_each_once("structures", "methods")


class Steering(Section):
    """What latents do: their decoder rows added to the residues' activations, all later layers computed anew, and the
    change of the model's predictions at masked residues, against controls."""

    latents: Annotated[list[Whole] | Literal["densest", "concepts"], SCIENCE] = "densest"
    """Which are steered: a list, the most frequent on the proteins steered, or those of highest concept F1 (needs `concepts`)."""
    top: Annotated[Count, SCIENCE] = 16
    """How many, unless they are listed."""
    mode: Annotated[Literal["add", "clamp", "ablate"], SCIENCE] = "add"
    """`add`: strength x the latent's maximum x its decoder row; `clamp`: the activation set to strength x maximum, the
    reconstruction's error kept; `ablate`: the activation set to 0."""
    strengths: Annotated[Annotated[list[float], Field(min_length=1)], SCIENCE] = [1.0]
    """Multiples of the latent's maximum over training rows; of no effect with `ablate`."""
    residues: Annotated[Literal["all", "active"] | list[Count], SCIENCE] = "all"
    """Where: all residues, those on which the latent is active, or a list of positions from 1."""
    fasta: str | None = None
    """Proteins: FASTA, UniProtKB table or flat file, known by content; null takes held-out ones."""
    proteins: Annotated[Annotated[int, Field(ge=2)], SCIENCE] = 100
    """How many at most, the first."""
    max_length: Annotated[Count, SCIENCE] = 1022
    """Longer proteins are left out."""
    mask_rate: Annotated[Rate, SCIENCE] = 0.15
    """Share of the residues masked, where predictions are read: the same masks as in `fidelity`."""
    fdr: Annotated[Rate, SCIENCE] = 0.05
    """False discovery rate (Benjamini and Hochberg) at which effects are counted."""
    esmfold: str | None = None
    """Also fold every protein with every steer and control, by this model, as `structure.esmfold`: solvent-accessible surface
    (SASA), contacts, RMSD and pLDDT; null: not. A fold takes seconds: few latents, few proteins. Known by content."""
    recycles: Annotated[Whole | None, ADDED] = None
    """Of the folding, as in `structure`."""
    compute: Annotated[Auto | Literal["float32", "float16", "bfloat16"], SCIENCE] = "auto"
    """Number type of the model; `auto` is float32: changes may be small."""
    tasks: Count = 1
    """Pieces the latents are cut into."""
    batch_tokens: Auto | Count = "auto"
    """Tokens of one forward pass."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Steering:
        if self.mode == "ablate" and self.strengths != [1.0]:
            raise rule("strengths", "mode: ablate has no strength", "remove strengths")
        if 0.0 in self.strengths and self.mode == "add":
            raise rule("strengths", "a strength of 0 adds nothing", "remove it")
        if self.recycles is not None and self.esmfold is None:
            raise rule("recycles", "recycles is about folding, and esmfold is not set", "set esmfold, or remove it")
        if self.latents == []:
            raise rule("latents", "latents is an empty list", "name some, or `densest`")
        return self.require_each_once("strengths", "latents")


class Eval(Section):
    """Evidence about the trained dictionary and language models; ends in Parquet, JSON, a model card and an HTML report."""

    fidelity: Annotated[Fidelity, SCIENCE] = Fidelity()
    """Reconstruction and loss recovered."""
    concepts: Annotated[Concepts | None, SCIENCE] = None
    """Annotated residues; absent: not measured."""
    families: Annotated[Families | None, SCIENCE] = None
    """Protein families and activation patterns; absent: not measured."""
    probes: Annotated[Probes | None, SCIENCE] = None
    """Linear probes; absent: not measured."""
    encode: Annotated[Encode | None, SCIENCE] = None
    """Proteins of your own; absent: none."""
    contacts: Annotated[Contacts | None, SCIENCE] = None
    """Contacts of known structures; absent: not measured."""
    structure: Annotated[Structure | None, SCIENCE] = None
    """Predicted structures; absent: not measured."""
    steering: Annotated[Steering | None, SCIENCE] = None
    """What latents do to predictions; absent: not measured."""
    features: Annotated[Features | None, SCIENCE] = None
    """Examples of every latent, for its page; absent: none."""
    lm: Annotated[LanguageModels | None, SCIENCE] = None
    """Masked prediction of language models; absent: not measured."""
    representations: Annotated[Representations | None, SCIENCE] = None
    """What language models' layers tell; absent: not measured."""

    def of_models(self) -> list[LanguageModels | Representations]:
        """The axes about language models: they need no autoencoder."""
        return [axis for axis in (self.lm, self.representations) if axis is not None]

    @model_validator(mode="after")
    def _concepts_choose(self) -> Eval:
        if self.steering is not None and self.steering.latents == "concepts" and self.concepts is None:
            raise rule(
                "steering.latents", "steering.latents: concepts needs eval.concepts", "add it, or steer `densest`"
            )
        return self
