"""How several ranks share an SAE: the tokens of a batch, or the dictionary's latents."""

from __future__ import annotations

from typing import Literal

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.training import Train
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.matryoshka import MatryoshkaTopK
from plmsae_cli.sae.topk import TopK

Sharing = Literal["data", "latents"]


HIDDEN = 3
"""Bytes of `data` that cost what one of `latents` costs: they travel beside the computation. In all of eight measured cases
(two H200 over NVLink, four shapes, batches whole and doubled; `benchmarks/README.md`) 3 chooses the faster way."""


def why_not_latents(model: Dictionary, options: Train, world: int) -> str | None:
    """What stands against spreading the latents; None where nothing does."""
    if type(model) not in (TopK, MatryoshkaTopK):
        return f"architecture: {options.autoencoder().architecture} chooses its latents otherwise than topk"
    if options.optimizer == "muon":
        return "optimizer: muon needs whole matrices"
    if model.num_latents % world:
        return f"{model.num_latents} latents do not split evenly over {world} ranks"
    return None


def bytes_sent(model: TopK, batch_tokens: int) -> dict[Sharing, int]:
    """Bytes that reach a rank in a step of the fused kernels, over (W - 1) / W; candidates and vectors aside.

    `data`: both matrices' gradients and then their copies, bfloat16. `latents`: raw rows and the error in bfloat16, each
    prefix's reconstruction in float32.
    """
    return {
        "data": 2 * model.num_latents * model.d * 2 * 2,
        "latents": batch_tokens * model.d * (2 + (4 + 2) * len(model.prefixes)),
    }


def demand_latents(model: Dictionary, options: Train, world: int) -> None:
    """Raises UserError where `train.parallel: latents` is asked for and cannot be."""
    reason = why_not_latents(model, options, world)
    if world > 1 and options.parallel == "latents" and reason is not None:
        raise UserError(f"train.parallel: latents cannot be had here: {reason}", "set train.parallel: auto")


def sharing(model: Dictionary, options: Train, world: int, fused: bool) -> Sharing:
    """What `train.parallel` and the case make of it; `auto` is `data` unless kernels are `fused` and `latents` sends far less.

    Raises:
        UserError: `train.parallel: latents` where it cannot be.
    """
    demand_latents(model, options, world)
    if world == 1 or options.parallel == "data":
        return "data"
    if options.parallel == "latents":
        return "latents"
    if not fused or why_not_latents(model, options, world) is not None:
        return "data"
    assert isinstance(model, TopK)
    sent = bytes_sent(model, options.batch_tokens)
    return "latents" if HIDDEN * sent["latents"] <= sent["data"] else "data"
