"""What the training loop asks of whatever is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from plmsae_cli.store import checkpoint as checkpoints


class Objective(Protocol):
    """What is trained. Its state after step s is a function of its state before and of s alone."""

    tokens_per_step: int
    device: torch.device
    compute: torch.dtype
    """Arithmetic of the large products."""

    def step(self, step: int) -> Mapping[str, torch.Tensor]:
        """One optimiser step; returns 0-dim figures on the device, each a rank's share of a sum over ranks: `loss`, `grad_norm`
        and what else there is. Where the norm of the gradients is not finite, the step changes no weights."""

    def rates(self, step: int) -> Mapping[str, float]:
        """Host figures of this step that cost nothing: `lr`, and `loader_wait`, the seconds waited for data so far."""

    def read_at(self, step: int) -> str:
        """What all ranks read at this step, in words."""

    def flops_per_step(self) -> float:
        """Floating-point operations that the mathematics of a step needs, over all ranks."""

    def tensors(self) -> Mapping[str, torch.Tensor | checkpoints.Part]:
        """Everything that must be restored, by name; of what is spread over ranks, this one's part."""

    def state(self) -> Mapping[str, Any]:
        """Plain values beside the tensors, the same on all ranks."""

    def load(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None: ...

    def validate(self, step: int) -> Mapping[str, Any]:
        """Figures of a validation due after this many steps, or nothing."""

    def over(self, step: int) -> bool:
        """Whether training ends after this many steps, before their number is reached; the same on all ranks."""
