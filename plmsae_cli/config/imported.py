"""Options of `train.imported`: a dictionary that another project has trained."""

from __future__ import annotations

from typing import Annotated, Literal

from plmsae_cli.config.base import SCIENCE, Positive, Section, Whole


class ImportedSAE(Section):
    """A dictionary of another project, brought into the run's `sae/` instead of one being trained."""

    path: str
    """A folder of SAELens (`cfg.json`), InterPLM or dictionary_learning (`ae.pt`), or one file of weights, `.pt`, or `.ckpt` of
    SAEFold; local or `s3://`. Identified by content. Nothing in it is run."""
    weights: Annotated[str | None, SCIENCE] = None
    """The language model it was trained on, such as `esm2_t6_8M_UR50D`; asked for where the files do not say, and counts where
    they say otherwise."""
    layer: Annotated[Whole | None, SCIENCE] = None
    """The layer it was trained on, as `embed.layers` counts; asked for where the files do not say, and counts where they say
    otherwise."""
    norm_factor: Annotated[Positive | None, SCIENCE] = None
    """What activations were divided by in its training, where its biases are still in that unit (SAEFold's checkpoints, SAELens'
    `expected_average_only_in`); 1 says that they were not."""
    selection: Annotated[Literal["topk", "batch_topk"] | None, SCIENCE] = None
    """How an `ae.pt` with k chooses its latents: the k largest of a residue, or all above its threshold; asked for where no
    settings lie beside it."""
