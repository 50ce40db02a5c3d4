"""A step of an SAE in plain PyTorch, compiled on GPUs where its loss has the same shape in every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from plmsae_cli.runtime.dist import Gang
from plmsae_cli.sae.dead import DeadLatents
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.interface import Losses
from plmsae_cli.training.compiled_gradients import demand_same_gradients
from plmsae_cli.training.optimizers import Optimizer

MARGIN = 2
"""How many times its step's bytes have to be free for a dictionary's pass without the compiler."""


class _Forward(NamedTuple):
    """This rank's losses, and what its figures are made of."""

    losses: Losses
    error: Tensor
    """Of the whole dictionary: the loss of a Matryoshka is a mean over its prefixes."""
    sums_3: Tensor
    """float64: ||x||^2, active pairs, the square of a token's number of them, each summed over tokens."""


@dataclass(frozen=True, eq=False)
class StepParts:
    """What a step in plain PyTorch needs beside its model."""

    optimizer: Optimizer
    dead: DeadLatents
    window: int
    """Tokens without firing after which a latent is dead."""
    max_norm: float | None
    standardise: Callable[[Tensor], Tensor]
    compute: torch.dtype
    total_steps: int
    gang: Gang
    compiled: bool = True
    """Whether to compile what can be, on a GPU."""


class PlainStep:
    """Backward, sum over ranks, remove the gradient along each decoder row, clip, update, renormalise rows."""

    def __init__(self, model: Dictionary, parts: StepParts) -> None:
        self._model, self._parts = model, parts
        self._forward: Any = self._eager_forward
        self._project: Any = model.project_gradients
        self._normalize: Any = model.normalize_decoder
        self._unchecked = parts.compiled and model.compiles and model.b_dec_D.is_cuda
        if self._unchecked:
            self._forward, self._project, self._normalize = (
                torch.compile(part, dynamic=False) for part in (self._forward, self._project, self._normalize)
            )

    def __call__(self, rows_BD: Tensor, step: int, rate: float) -> Mapping[str, Tensor]:
        """Train on this rank's raw rows; figures are shares of a sum over ranks.

        Raises UserError at the first step, where what is compiled has other gradients than it has without the compiler.
        """
        model, gang = self._model, self._parts.gang
        batch = len(rows_BD) * gang.world
        model.schedule(step, self._parts.total_steps)
        dead_N = self._parts.dead.mask(self._parts.window)
        if self._unchecked:
            self._check(rows_BD, dead_N)
        forward: _Forward = self._forward(rows_BD, dead_N)
        self._parts.optimizer.zero_grad()
        forward.losses.total.backward()  # type: ignore[no-untyped-call]
        gang.sum_gradients(model.parameters())
        self._project()
        norm = model.d * self._parts.optimizer.step(rate, self._parts.max_norm)
        self._normalize()
        self._parts.dead.update(forward.losses.fired_N, batch, gang.sum)
        energy, active, squares = gang.sum(forward.sums_3)
        l0 = active / batch
        share = 1.0 / gang.world  # of figures that every rank knows whole
        return {
            "loss": forward.losses.total,
            "reconstruction": forward.losses.reconstruction,
            "aux": forward.losses.aux,
            "fvu": forward.error / energy,
            "l0": forward.losses.active_B.sum() / batch,
            "l0_std": (squares / batch - l0.square()).clamp(min=0.0).sqrt() * share,
            "dead": dead_N.float().mean() * share,
            "grad_norm": norm * share,
        }

    def _check(self, rows_BD: Tensor, dead_N: Tensor) -> None:
        self._unchecked = False
        weights = sum(4 * parameter.numel() for parameter in self._model.parameters())
        needed = MARGIN * self._model.step_bytes(len(rows_BD)) + 4 * weights  # three gradients, and one passing
        short = torch.full((), float(needed > _free_bytes(rows_BD.device)), device=rows_BD.device)
        # Ranks look together or not at all: some losses are sums over all of them.
        if self._parts.gang.maximum(short):
            return

        def term(forward: Callable[..., _Forward], name: str) -> Callable[[], Tensor]:
            return lambda: cast(Tensor, getattr(forward(rows_BD, dead_N).losses, name))

        parameters, one_row = dict(self._model.named_parameters()), self._eager_forward(rows_BD[:1], dead_N).losses
        # The penalty by itself too: it weighs little at first, and would be lost in the error.
        for name in ("total", "aux"):
            if getattr(one_row, name).requires_grad:
                compiled, plain = term(self._forward, name), term(self._eager_forward, name)
                demand_same_gradients(parameters, compiled, plain, self._parts.gang.maximum)

    def _eager_forward(self, rows_BD: Tensor, dead_N: Tensor) -> _Forward:
        x_BD = self._parts.standardise(rows_BD)
        compute = self._parts.compute
        with torch.autocast(x_BD.device.type, compute, enabled=compute != torch.float32):
            losses = self._model.loss(x_BD, dead_N, len(x_BD) * self._parts.gang.world, self._parts.gang.sum)
        active_B = losses.active_B.double()
        sums_3 = torch.stack([x_BD.square().sum().double(), active_B.sum(), active_B.square().sum()])
        return _Forward(losses, (losses.xhat_BD - x_BD).square().sum(), sums_3)


def _free_bytes(device: torch.device) -> float:
    """What a process can still have there."""
    if device.type != "cuda":
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
