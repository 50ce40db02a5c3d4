"""Options of `train.kind: plm`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from plmsae_cli.config.base import SCIENCE, Count, Fraction, Section, rule


class PLM(Section):
    """A protein language model trained from scratch (`train.kind: plm`)."""

    architecture: Annotated[Literal["esm2"], SCIENCE] = "esm2"
    """`esm2`: the ESM-2 encoder, so that `embed` reads the result."""
    fasta: str | None = None
    """Proteins to train on; split by the hash that `embed` uses."""
    bin: str | list[str] | None = None
    """Token shards to train on instead of a FASTA: SpeedrunningPLMs' `.bin` files as they are, by path or glob or a list of
    both, local or `s3://`; split by the same hash."""
    valid: dict[str, str | list[str]] = Field(default_factory=dict)
    """Further validation sets by name (such as held-out clusters), never trained on: a FASTA file each, or `.bin` shards."""
    num_layers: Annotated[Count, SCIENCE] = 6
    """Transformer blocks."""
    hidden_size: Annotated[Count, SCIENCE] = 192
    """Dimension of the residual stream."""
    num_attention_heads: Annotated[Count, SCIENCE] = 6
    """Heads a block; must divide `hidden_size` into even parts."""
    max_length: Annotated[Count, SCIENCE] = 1022
    """Longest protein in residues; longer ones are truncated."""
    holdout: Annotated[Fraction, SCIENCE] = 0.01
    """Share of the proteins kept for validation, by the hash of the sequence."""
    mask_rate: Annotated[Annotated[float, Field(gt=0.0, lt=1.0)], SCIENCE] = 0.15
    """Share of the residues to predict."""
    corruption: Annotated[Literal["bert", "mask"], SCIENCE] = "bert"
    """Chosen residues become: `bert` 80 % <mask>, 10 % random, 10 % kept; `mask` 100 % <mask>."""
    weight_decay: Annotated[float, Field(ge=0.0), SCIENCE] = 0.01
    """Decoupled weight decay of the matrices."""
    pack_tokens: Annotated[Count, SCIENCE] = 16_384
    """Tokens of one pack (micro-batch); `train.batch_tokens` is a multiple of it."""
    eval_every: Count = 1000
    """Steps between validations."""
    eval_tokens: Count = 1_000_000
    """Tokens of each validation set that are scored, with masks that never change."""

    @model_validator(mode="after")
    def _one_source(self) -> PLM:
        if (self.fasta is None) == (self.bin is None):
            given = "both are given" if self.fasta is not None else "neither is given"
            raise rule("fasta", f"proteins come from fasta or from bin: {given}", "name one of the two")
        named = {"bin": self.bin, **{f"valid.{name}": files for name, files in self.valid.items()}}
        for name, files in named.items():
            several = isinstance(files, list)
            for path in [] if files is None else files if isinstance(files, list) else [files]:
                if (several or name == "bin") and not path.endswith(".bin"):
                    raise rule(name, f"{path} does not end in .bin", "name token shards, or a FASTA file alone")
            if files == []:
                raise rule(name, f"{name} is an empty list", "name at least one file")
        return self

    @model_validator(mode="after")
    def _shapes(self) -> PLM:
        if self.hidden_size % self.num_attention_heads or (self.hidden_size // self.num_attention_heads) % 2:
            raise rule(
                "num_attention_heads",
                f"hidden_size ({self.hidden_size}) does not split into {self.num_attention_heads} heads of even width",
                "rotary embeddings need hidden_size / num_attention_heads to be an even number",
            )
        if self.pack_tokens < self.max_length + 2:
            raise rule(
                "pack_tokens",
                f"pack_tokens ({self.pack_tokens}) cannot hold one protein of max_length ({self.max_length}) + 2",
                "raise pack_tokens or lower max_length",
            )
        return self
