"""Options of `train.kind: plm`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, model_validator

from plmsae_cli.config.base import (
    ADDED,
    SCIENCE,
    Auto,
    Count,
    Fraction,
    NotNegative,
    Positive,
    Rate,
    Section,
    Whole,
    rule,
)

UNET_ONLY = (
    "expansion_ratio", "soft_logit_cap", "attention_soft_cap", "tie_embeddings", "unet", "value_embeddings",
    "mask_embedding", "p_attention", "num_att_tokens", "window",
)  # fmt: skip
"""Options that `architecture: esm2` has no use for."""


def raced(names: Collection[str]) -> str | None:
    """The validation set that races and leaderboards are about: `random`, else `valid`, else the first by name."""
    return next((name for name in ("random", "valid", *sorted(names)) if name in names), None)


class Speedrun(Section):
    """A race to a validation loss (`train.plm.speedrun`)."""

    target_loss: Annotated[Positive, SCIENCE]
    """Training ends after the first validation whose loss is below (nats): that of the random split, else of the set `valid`,
    else of the first by name."""
    max_parameters: Count | None = None
    """Most parameters of a model in this race; more are refused before anything runs."""


class PLM(Section):
    """A protein language model trained from scratch (`train.kind: plm`)."""

    architecture: Annotated[Literal["esm2", "unet"], SCIENCE] = "esm2"
    """`esm2`: the ESM-2 encoder. `unet`: the speed runs' transformer, with skips from its first half to its second, value
    embeddings and squared ReLU. `embed` reads both."""
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
    expansion_ratio: Annotated[Positive, ADDED] = 8 / 3
    """`unet`: width of the feed-forward layers over `hidden_size`, rounded up to a multiple of 256."""
    soft_logit_cap: Annotated[Positive, ADDED] = 32.0
    """`unet`: logits are cap tanh(z / cap)."""
    attention_soft_cap: Annotated[Positive | None, ADDED] = None
    """`unet`: scores of attention are cap tanh(s / cap). Null: as they are."""
    tie_embeddings: Annotated[bool, ADDED] = False
    """`unet`: the output weight is the embedding's."""
    unet: Annotated[bool, ADDED] = True
    """`unet`: skips and the mixing in of the embedding; false leaves a plain transformer."""
    value_embeddings: Annotated[bool, ADDED] = True
    """`unet`: attention's values are mixed with embeddings of the token, one table for blocks i and L - 1 - i."""
    mask_embedding: Annotated[bool, ADDED] = True
    """`unet`: `<mask>` has an embedding like any token; false: the stream and x0 begin at 0 there, as in the published runs."""
    p_attention: Annotated[bool, ADDED] = False
    """`unet`: q, k and v come from attention to `num_att_tokens` learned keys and values instead of a matrix."""
    num_att_tokens: Annotated[Count, ADDED] = 512
    """Learned keys and values of `p_attention`."""
    window: Annotated[Count | None, ADDED] = 1024
    """`unet`: at the start a token attends to others less than so many places away; this grows in four steps to the whole
    protein. Null: the whole protein from the start."""
    max_length: Annotated[Count, SCIENCE] = 1022
    """Longest protein in residues; longer ones are truncated."""
    holdout: Annotated[Fraction, SCIENCE] = 0.01
    """Share of the proteins kept for validation, by the hash of the sequence."""
    objective: Annotated[Literal["mlm", "masked_diffusion"], ADDED] = "mlm"
    """`mlm`: mean cross-entropy of the residues to predict. `masked_diffusion`: each protein has its own share t, uniform
    in .001 to 1, of masked residues, and the loss is sum(CE / t) over all residues there are."""
    mask_rate: Annotated[Rate, SCIENCE] = 0.15
    """Share of the residues to predict, in `mlm` and in the warm-up of `masked_diffusion`."""
    starting_mask_rate: Annotated[Rate | None, ADDED] = None
    """Share at the start, from which it goes to `mask_rate` in a straight line; null: `mask_rate` from the start."""
    mask_rate_steps: Annotated[Count, ADDED] = 2500
    """Steps from `starting_mask_rate` to `mask_rate`."""
    diffusion_warmup_steps: Annotated[Whole, ADDED] = 0
    """`masked_diffusion`: steps over which proteins masked at `mask_rate` give way to those with a share of their own."""
    corruption: Annotated[Literal["bert", "mask"], SCIENCE] = "bert"
    """Chosen residues become: `bert` 80 % <mask>, 10 % random, 10 % kept; `mask` 100 % <mask>."""
    weight_decay: Annotated[NotNegative, SCIENCE] = 0.01
    """Decoupled weight decay of the matrices."""
    lr_hidden: Annotated[Auto | Positive, ADDED] = "auto"
    """Peak rate of the blocks' matrices. `auto`: `train.lr`; where that is auto too and with `optimizer: muon`, .05 for
    `unet` and .02 for `esm2`."""
    lr_embed: Annotated[Auto | Positive, ADDED] = "auto"
    """Peak rate of the embeddings. `auto`: `train.lr`; where that is auto too, with `muon` and `unet`, .06."""
    lr_head: Annotated[Auto | Positive, ADDED] = "auto"
    """Peak rate of the output head. `auto`: `train.lr`; where that is auto too, with `muon` and `unet`, .008."""
    lr_scalar: Annotated[Auto | Positive, ADDED] = "auto"
    """Peak rate of all that is no matrix. `auto`: `train.lr`; where that is auto too, with `muon` and `unet`, .04."""
    muon_momentum_warmup_steps: Annotated[Whole, ADDED] = 300
    """Steps in which the momentum of `optimizer: muon` rises from .85 to `train.momentum`."""
    cooldown_steps: Annotated[Count | None, ADDED] = None
    """Last steps, over which the rate falls; null: the share `train.lr_decay`."""
    scheduler_type: Annotated[Literal["linear", "cosine"], ADDED] = "linear"
    """Shape of that fall to zero."""
    ema: Annotated[Rate | None, ADDED] = None
    """Decay a step of an average of the weights, which is then what is validated and saved; null: the weights."""
    pack_tokens: Annotated[Count, SCIENCE] = 16_384
    """Tokens of one pack (micro-batch); `train.batch_tokens` is a multiple of it."""
    speedrun: Annotated[Speedrun | None, ADDED] = None
    """Train until a validation loss is reached, within a number of parameters; the clock in the run's figures counts
    training, not compiling, validating and saving."""
    max_hours: Annotated[Positive | None, ADDED] = None
    """Hours of training, by that clock over all starts, after which it ends."""
    eval_every: Count = 1000
    """Steps between validations."""
    eval_tokens: Count = 1_000_000
    """Tokens of each validation set that are scored: 15 % of the residues, with masks that never change."""

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
        if self.architecture == "unet" and self.unet and self.num_layers % 2:
            raise rule(
                "num_layers",
                f"num_layers ({self.num_layers}) is odd, and a UNet has two halves",
                f"use {self.num_layers + 1}, or unet: false",
            )
        if self.pack_tokens < self.max_length + 2:
            raise rule(
                "pack_tokens",
                f"pack_tokens ({self.pack_tokens}) cannot hold one protein of max_length ({self.max_length}) + 2",
                "raise pack_tokens or lower max_length",
            )
        return self

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> PLM:
        for name in UNET_ONLY:
            if self.architecture == "esm2" and self.changed(name):
                raise rule(name, f"{name} has no effect with architecture: esm2", "set architecture: unet or remove it")
        if self.speedrun is not None and not self.holdout and not self.valid:
            raise rule(
                "speedrun",
                "speedrun races to a validation loss, and there is no validation set",
                "set holdout or valid",
            )
        if not self.unet and self.changed("value_embeddings"):
            raise rule("value_embeddings", "value_embeddings has no effect with unet: false", "remove it")
        if not self.p_attention and self.changed("num_att_tokens"):
            raise rule("num_att_tokens", "num_att_tokens has no effect without p_attention", "add p_attention: true")
        if self.objective == "mlm" and self.diffusion_warmup_steps:
            raise rule(
                "diffusion_warmup_steps",
                "diffusion_warmup_steps has no effect with objective: mlm",
                "set objective: masked_diffusion or remove it",
            )
        if self.objective == "masked_diffusion" and self.changed("corruption") and self.corruption != "mask":
            raise rule("corruption", "masked_diffusion knows <mask> alone", "write corruption: mask or remove it")
        if self.starting_mask_rate is None and self.changed("mask_rate_steps"):
            raise rule("mask_rate_steps", "mask_rate_steps has no effect without starting_mask_rate", "set both")
        if self.objective == "masked_diffusion" and self.starting_mask_rate and not self.diffusion_warmup_steps:
            raise rule(
                "starting_mask_rate",
                "starting_mask_rate has no effect with masked_diffusion and no diffusion_warmup_steps",
                "add diffusion_warmup_steps or remove it",
            )
        return self
