"""Whether a dictionary can be trained by the fused CUDA step, and that step for it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Train
from plmsae_cli.sae.batch_topk import BatchTopK
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.jumprelu import JumpReLU
from plmsae_cli.sae.matryoshka import MatryoshkaBatchTopK, MatryoshkaTopK
from plmsae_cli.sae.ranks import Ranks
from plmsae_cli.sae.switch import Switch
from plmsae_cli.sae.topk import TopK

MOST_ACTIVE = 512
"""Active latents a token for which a block of decoder rows fits every supported GPU's shared memory."""
MOST_EXPERTS = 256
"""Switch's experts of which a block of the router fits every supported GPU's shared memory."""
ALONE = (JumpReLU, Switch)
"""Architectures that have the fused step on one GPU alone."""

if TYPE_CHECKING:
    from plmsae_cli.sae.fused.latents import FusedLatentStep
    from plmsae_cli.sae.fused.step import FusedStep


def why_no_kernels(model: Dictionary, options: Train, world: int) -> str | None:
    """What stands against the fused step on any `world` GPUs; None where nothing does."""
    if type(model) not in (TopK, MatryoshkaTopK, BatchTopK, MatryoshkaBatchTopK, *ALONE):
        return f"architecture: {options.autoencoder().architecture} has none"
    if world > 1 and isinstance(model, ALONE):
        return f"architecture: {options.autoencoder().architecture} has it on one GPU alone"
    if isinstance(model, JumpReLU) and model.penalty != "l0":
        return f"penalty: {model.penalty}; it reaches latents that are not active"
    if isinstance(model, TopK) and model.k_start is not None:
        return "k_start changes k while training"
    if isinstance(model, BatchTopK) and model.selection == "local":
        return "selection: local"
    if options.optimizer != "adam":
        return f"optimizer: {options.optimizer}; it updates by adam"
    if isinstance(model, TopK | Switch) and model.k > MOST_ACTIVE:
        return f"k ({model.k}) is above {MOST_ACTIVE}"
    if isinstance(model, Switch) and model.num_experts > MOST_EXPERTS:
        return f"num_experts ({model.num_experts}) is above {MOST_EXPERTS}"
    if model.d % 16:
        return f"the activations' dimension ({model.d}) is not a multiple of 16"
    return None


def why_plain(model: Dictionary, options: Train, device: torch.device, compute: torch.dtype, world: int) -> str | None:
    """What stands against the fused step; None where nothing does."""
    reason = why_no_kernels(model, options, world)
    if reason is not None:
        return reason
    if device.type != "cuda" or torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    if compute != torch.bfloat16 or torch.cuda.get_device_capability(device) < (8, 0):
        return "it computes in bfloat16, on NVIDIA GPUs from the A100 on"
    return None if find_spec("triton") else "the package triton is not installed"


def demand_fused(options: Train, reason: str | None) -> None:
    """Raises UserError where `train.kernels: fused` is asked for and a reason stands against it."""
    if reason is not None and options.kernels == "fused":
        raise UserError(f"train.kernels: fused cannot be had here: {reason}", "set train.kernels: auto")


def goes_fused(model: Dictionary, options: Train, device: torch.device, compute: torch.dtype, world: int) -> bool:
    """Whether `fused_step` trains it, as `train.kernels` and the case have it.

    Raises:
        UserError: `train.kernels: fused` where it cannot be.
    """
    plain = options.kernels == "plain"
    reason = "train.kernels is plain" if plain else why_plain(model, options, device, compute, world)
    demand_fused(options, reason)
    return reason is None


def fused_step(
    model: Dictionary,
    options: Train,
    parameters: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    ages_N: Tensor,
    mean_D: Tensor,
    scale: float,
    window: int,
    max_norm: float | None,
    ranks: Ranks,
    latents: bool,
) -> FusedStep | FusedLatentStep:
    """The fused step on these tensors, where `goes_fused`; `latents`: they are spread over ranks."""
    from plmsae_cli.sae.fused.given import AdamOptions, Batch, Masters
    from plmsae_cli.sae.fused.jump import FusedJumpStep
    from plmsae_cli.sae.fused.latents import FusedLatentStep
    from plmsae_cli.sae.fused.step import FusedStep
    from plmsae_cli.sae.fused.switch import FusedSwitchStep

    batch = Batch(options.batch_tokens // ranks.world, mean_D, scale, window)
    adam = AdamOptions((options.betas[0], options.betas[1]), options.eps, max_norm)
    given = (Masters(parameters, state, ages_N), batch, adam, ranks)
    if isinstance(model, JumpReLU):
        return FusedJumpStep(model, *given)
    if isinstance(model, Switch):
        return FusedSwitchStep(model, *given)
    assert isinstance(model, TopK)
    return FusedLatentStep(model, *given) if latents else FusedStep(model, *given)
