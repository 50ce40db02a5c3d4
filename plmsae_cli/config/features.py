"""`eval.features`: the examples and figures that pages about latents are made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from plmsae_cli.config.base import SCIENCE, Auto, Bytes, Count, Section, rule


class Describe(Section):
    """Descriptions of latents by a language model of your choice, which is run elsewhere: prompts go out, its answers come
    back as files."""

    examples: Annotated[Count, SCIENCE] = 8
    """Strongest examples of a latent in its prompt; and random ones, as many, of all bands together."""
    heldout: Annotated[Count, SCIENCE] = 8
    """Held-out residues with an activation, and as many without, that a description has to tell apart."""
    window: Annotated[Count, SCIENCE] = 16
    """Residues shown to either side."""
    descriptions: str | None = None
    """JSONL of `latent` and `description`, as answered to `prompts.jsonl`. Known by content."""
    predictions: str | None = None
    """JSONL of `example` and `activation`, as answered to `scoring.jsonl`. Known by content."""


class Features(Section):
    """For every latent its strongest residues, random ones of each strength, and what else a page about it shows."""

    split: Annotated[Literal["train", "heldout"], SCIENCE] = "train"
    """Whose residues are read: `train`, the activations as `embed` left them, or `heldout`, those in the dataset itself."""
    top: Annotated[Count, SCIENCE] = 20
    """Strongest examples of a latent."""
    random: Annotated[Count, SCIENCE] = 50
    """Random examples of each of the four bands of activation / maximum: up to .25, .5, .75 and above."""
    one_per: Annotated[Literal["token", "protein", "cluster"], SCIENCE] = "protein"
    """A list of examples has one of each protein, or of each cluster of similar proteins (30 % identity); `token`: any."""
    clusters: Annotated[Auto | Literal["mmseqs", "kmer"], SCIENCE] = "auto"
    """As in `concepts`; with `one_per: cluster`, and for the relatives in `describe`."""
    context: Annotated[Count, SCIENCE] = 1022
    """Residues shown to either side of an example; the whole protein where it is no longer."""
    concepts: Annotated[Annotated[int, Field(ge=0, le=10)], SCIENCE] = 3
    """Concepts of a latent whose residues are counted at 100 thresholds, where `eval.concepts` is measured; 0: none."""
    describe: Describe | None = None
    """Prompts for a language model that describes latents; absent: none."""
    latents_per_group: Count = 128
    """Latents whose examples share a file."""
    tasks: Count = 1
    """Pieces the rows, and shares the latents, are cut into, for several workers; results are the same for any number."""
    memory: Bytes = Field(default="2GB", validate_default=True)
    """Bytes that a task may hold of examples; where they do not suffice, rows are read several times."""
    batch_tokens: Auto | Count = "auto"
    """Tokens of one forward pass of the language model, which concepts need."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Features:
        if self.describe is not None and self.split == "heldout":
            raise rule(
                "describe",
                "describe asks about held-out proteins, which split: heldout shows in its prompts",
                "use split: train",
            )
        if self.changed("clusters") and self.one_per != "cluster" and self.describe is None:
            raise rule("clusters", "clusters has no effect without one_per: cluster or describe", "remove it")
        return self
