"""Optimisers with named state and clipping inside the update; none waits for the device."""

from plmsae_cli.training.optimizers.adam import Adam
from plmsae_cli.training.optimizers.base import Group, Optimizer
from plmsae_cli.training.optimizers.choice import build_optimizer
from plmsae_cli.training.optimizers.grouped_muon import GroupedMuon
from plmsae_cli.training.optimizers.muon import Muon
from plmsae_cli.training.optimizers.rounded_adam import RoundedAdam
from plmsae_cli.training.optimizers.signum import Signum

__all__ = ["Adam", "Group", "GroupedMuon", "Muon", "Optimizer", "RoundedAdam", "Signum", "build_optimizer"]
