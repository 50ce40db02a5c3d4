"""The optimiser that the options ask for."""

from __future__ import annotations

from collections.abc import Sequence

from plmsae_cli.config.training import Train
from plmsae_cli.training.optimizers.adam import Adam
from plmsae_cli.training.optimizers.base import Group, Optimizer
from plmsae_cli.training.optimizers.muon import Muon
from plmsae_cli.training.optimizers.rounded_adam import RoundedAdam
from plmsae_cli.training.optimizers.signum import Signum

MOMENTUM = {"muon": 0.95, "signum": 0.9}
"""`train.momentum: auto`: Jordan et al. 2024; Bernstein et al. 2018."""


def build_optimizer(options: Train, groups: Sequence[Group]) -> Optimizer:
    """The optimiser of `train.optimizer`, `moments`, `momentum`, `betas` and `eps` for these parameters."""
    betas = (options.betas[0], options.betas[1])
    if options.optimizer == "adam":
        kind = Adam if options.moments == "float32" else RoundedAdam
        return kind(groups, betas, options.eps)
    momentum = MOMENTUM[options.optimizer] if options.momentum == "auto" else options.momentum
    if options.optimizer == "muon":
        return Muon(groups, momentum, betas, options.eps)
    return Signum(groups, momentum)
