"""What every optimiser offers: a step with clipping, and state by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class Group:
    """Parameters that share their options."""

    name: str
    parameters: Mapping[str, Parameter]
    weight_decay: float = 0.0
    """Decoupled (AdamW, Loshchilov & Hutter 2019): each step first shrinks weights by rate * weight_decay."""
    lr_scale: float = 1.0
    """This group's rate is the step's rate times this."""
    first_rows: Mapping[str, int] = field(default_factory=dict)
    """Of parameters that are some rows of a larger tensor: where in it they begin."""
    linear_maps: bool = True
    """Its 2-D parameters multiply vectors, as Muon expects; an embedding's rows are looked up instead."""


class Optimizer(ABC):
    """Updates named groups of parameters by their gradients."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = tuple(groups)
        self._named = {f"{group.name}.{name}": p for group in groups for name, p in group.parameters.items()}

    @torch.no_grad()
    def step(self, learning_rate: float, max_norm: float | None = None, norm: Tensor | None = None) -> Tensor:
        """Update all parameters by their gradients, whose global norm is first scaled down to `max_norm`.

        `norm`: that norm, where ranks hold different parameters. Returns the norm before scaling, on the device: nothing
        waits for it. Where it is not finite, nothing is changed (on any rank, as all know the same norm). Gradients may
        be scaled in place.
        """
        if norm is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self._named.values() if p.grad is not None])
        divisor = None if max_norm is None else (norm / max_norm).clamp(min=1.0).float()
        self.update(learning_rate, divisor, ~norm.isfinite())
        return norm

    @abstractmethod
    def update(self, learning_rate: float, divisor: Tensor | None, skip: Tensor) -> None:
        """One update by the gradients over `divisor`; none where `skip` is true. Both 0-dim, on the device."""

    @abstractmethod
    def state_tensors(self) -> dict[str, Tensor]:
        """`<group>.<parameter>.<what>` -> the live tensor (not a copy)."""

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self._named.values():
            parameter.grad = None

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state_tensors` gave. Raises ValueError where names or shapes differ."""
        own = self.state_tensors()
        differing = sorted(
            name
            for name in own.keys() | tensors.keys()
            if name not in own or name not in tensors or own[name].shape != tensors[name].shape
        )
        if differing:
            raise ValueError(f"the saved optimiser state does not fit these parameters: {', '.join(differing)}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def _trained(self) -> Iterator[tuple[Group, str, Parameter, Tensor]]:
        """(group, full name, parameter, gradient) of all that have a gradient."""
        for group in self._groups:
            for name, parameter in group.parameters.items():
                if parameter.grad is not None:
                    yield group, f"{group.name}.{name}", parameter, parameter.grad


def safe_gradient(gradient: Tensor, divisor: Tensor | None, skip: Tensor, instead: Tensor) -> Tensor:
    """The clipped gradient, or `instead` where the step is skipped."""
    return torch.where(skip, instead, gradient if divisor is None else gradient / divisor)
