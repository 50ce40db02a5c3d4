"""`eval.structure`: proteins folded with and without the dictionary."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from plmsae_cli.config.base import SCIENCE, Auto, Count, Section, Whole, rule


class Structure(Section):
    """What ESMFold predicts when its language model's layer is replaced by the reconstruction, by zeros or by the mean, against
    its own prediction and against experimental structures."""

    structures: list[str] = []
    """Experimental structures, as in `contacts`: sequence and reference are read from them."""
    fasta: str | None = None
    """Proteins without (or with, see references) a structure: FASTA, UniProtKB table or flat file. Known by content."""
    references: str | None = None
    """Folder with experimental structures of proteins of `fasta`: `<id>.pdb`, `.ent` or `.cif`, plain or gzip. Those that are
    absent are compared with the original prediction alone. Known by content."""
    sequence: Annotated[Literal["resolved", "seqres"], SCIENCE] = "resolved"
    """What is folded of `structures`: the residues with coordinates, or all that were in the crystal."""
    ids: Annotated[list[str] | None, SCIENCE] = None
    """Proteins of `fasta` to fold, by id; null: all."""
    proteins: Annotated[Count | None, SCIENCE] = None
    """How many proteins at most, the first; null: all."""
    max_length: Annotated[Count, SCIENCE] = 1022
    """Longer proteins are left out. Folding L residues takes memory as L^2 and time as L^3."""
    esmfold: str = "facebook/esmfold_v1"
    """A folder that transformers reads, or a name in the local Hugging Face cache (`hf download facebook/esmfold_v1`). Its
    language model must be `model.weights`: ESM-2 3B for esmfold_v1. `random`: a small folding head with random weights on
    `model.weights`, to try things out. Known by content."""
    modes: Annotated[Annotated[list[Literal["isolated", "in_place", "propagated"]], Field(min_length=1)], SCIENCE] = [
        "isolated",
        "propagated",
    ]
    """What the structure is predicted from. `isolated`: the dictionary's layer alone, all other hidden states zero (SAEFold);
    `in_place`: all hidden states, that layer replaced; `propagated`: replaced where it is computed, later layers anew."""
    k: Annotated[list[Count], SCIENCE] = []
    """Numbers of active latents that are tried at inference, in TopK dictionaries and their kin: 1, 2, 4 ... 128."""
    prefixes: Annotated[list[Count] | Literal["groups"], SCIENCE] = []
    """Matryoshka: reconstructions from the first so many latents; `groups`: from each of its nested groups."""
    recycles: Annotated[Whole | None, SCIENCE] = None
    """Passes of the folding trunk after the first; null: as the model is configured (3)."""
    bootstraps: Annotated[Count, SCIENCE] = 1000
    """Draws of proteins for the 95 % intervals."""
    tasks: Count | Auto = "auto"
    """Pieces the proteins are cut into; `auto`: one a protein, 32 at most. Results are the same for any number."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Structure:
        if self.fasta is None and not self.structures:
            raise rule("fasta", "eval.structure has no proteins", "name structures, or a fasta")
        for name in ("references", "ids"):
            if getattr(self, name) is not None and self.fasta is None:
                raise rule(name, f"{name} is about the proteins of fasta, which is not set", "set fasta, or remove it")
        return self.require_each_once("structures", "ids", "modes", "k", "prefixes")
