"""An exponential average of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Average:
    """a <- decay a + (1 - decay) w after each step, from the initial weights on; in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._weights = {name: p.detach() for name, p in model.named_parameters()}
        self._averages = {name: w.clone() for name, w in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of one more step."""
        averages, weights = list(self._averages.values()), list(self._weights.values())
        torch._foreach_lerp_(averages, weights, 1 - self._decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Put the averages into the model and its weights here, or back."""
        for name, weight in self._weights.items():
            kept = weight.clone()
            weight.copy_(self._averages[name])
            self._averages[name].copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """Parameter name -> its live average (not a copy)."""
        return self._averages

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, average in self._averages.items():
            average.copy_(tensors[name])
