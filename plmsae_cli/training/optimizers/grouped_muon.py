"""Muon for whole models: matrices of one shape together, each rank its share of the orthogonalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from plmsae_cli.plm.attention import has_kernels
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.training.optimizers.adam import Adam
from plmsae_cli.training.optimizers.base import Group, Optimizer
from plmsae_cli.training.optimizers.muon import COEFFICIENTS, ITERATIONS

START = 0.85
"""Momentum of the first step."""


@dataclass(frozen=True)
class _Stack:
    """Matrices of one shape and group, one after the other; a parameter [..., R, C] is several."""

    group: Group
    names: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    momentum_NRC: Tensor

    def split(self, whole_NRC: Tensor) -> list[Tensor]:
        """Views of each parameter's matrices, in its shape."""
        counts = [p.numel() // math.prod(p.shape[-2:]) for p in self.parameters]
        parts = torch.split(whole_NRC, counts)
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]


class GroupedMuon(Optimizer):
    """m <- mu m + (1 - mu) g;  u = NS((1 - mu) g + mu m);  W <- (1 - rate wd) W - rate sqrt(max(1, rows / columns)) u.

    Jordan et al. 2024 (kellerjordan.github.io/posts/muon) for parameters of two and more dimensions of groups with
    `linear_maps`, whose last two are a matrix; all others by Adam. mu rises from .85 to `momentum` in a straight line over
    `warmup_steps` updates: the caller sets `steps_done` before each. A group's rate is the step's times its `lr_scale`.
    Ranks orthogonalise equal shares of a stack and gather them, whatever their number.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        momentum: float,
        warmup_steps: int,
        betas: tuple[float, float],
        eps: float,
        gang: Gang | None = None,
        arithmetic: torch.dtype | None = None,
        compiles: bool = True,
    ) -> None:
        """`arithmetic`: of Newton-Schulz, by default bfloat16 on CUDA and float32 on a CPU. `compiles`: whether torch's compiler
        makes one pass of what comes before it on CUDA."""
        super().__init__(groups)
        self.steps_done = 0
        self._momentum, self._warmup, self._arithmetic = momentum, warmup_steps, arithmetic
        self._gang, self._compiles = gang or Gang(), compiles
        self._adam = Adam([_part(group, matrices=False) for group in groups], betas, eps)
        self._stacks = [stack for group in groups for stack in _stacks(_part(group, matrices=True))]

    def state_tensors(self) -> dict[str, Tensor]:
        """`<group>.<parameter>.momentum` of matrices, and Adam's of all others -> the live tensor (not a copy)."""
        matrices = {
            f"{stack.group.name}.{name}.momentum": tensor
            for stack in self._stacks
            for name, tensor in zip(stack.names, stack.split(stack.momentum_NRC), strict=True)
        }
        return matrices | self._adam.state_tensors()

    def momentum(self) -> float:
        """mu of the coming update."""
        done = 1.0 if self._warmup == 0 else min(1.0, self.steps_done / self._warmup)
        return START + (self._momentum - START) * done if self._warmup else self._momentum

    def update(self, learning_rate: float, divisor: Tensor | None, skip: Tensor) -> None:
        self._adam.update(learning_rate, divisor, skip)
        # As a tensor: a number would be a constant of what is compiled, and there are many.
        mu = torch.full((), self.momentum(), device=skip.device)
        divisor = torch.ones((), device=skip.device) if divisor is None else divisor
        for stack in self._stacks:
            m_NRC = stack.momentum_NRC
            rows, columns = m_NRC.shape[1:]
            gradients = [p.grad for p in stack.parameters]
            assert all(g is not None for g in gradients)
            g_NRC = torch.cat([g.view(-1, rows, columns) for g in gradients if g is not None])
            u_NRC = self._orthogonal(self._mixed(g_NRC, m_NRC, mu, divisor, skip))
            rate = torch.where(skip, 0.0, learning_rate * stack.group.lr_scale)
            u_NRC = u_NRC.float().mul_(-rate * math.sqrt(max(1.0, rows / columns)))
            weights: list[Tensor] = list(stack.parameters)
            if stack.group.weight_decay:
                torch._foreach_mul_(weights, 1 - rate * stack.group.weight_decay)
            torch._foreach_add_(weights, stack.split(u_NRC))

    @torch.no_grad()
    def prepare(self) -> None:
        """Have kernels compiled, where they are: an update that is skipped, and changes nothing."""
        for stack in self._stacks:
            m_NRC = stack.momentum_NRC
            if m_NRC.is_cuda:
                one, skip = torch.ones((), device=m_NRC.device), torch.ones((), dtype=torch.bool, device=m_NRC.device)
                orthogonalised(self._mixed(torch.zeros_like(m_NRC), m_NRC, one, one, skip))

    def _mixed(self, g_NRC: Tensor, m_NRC: Tensor, mu: Tensor, divisor: Tensor, skip: Tensor) -> Tensor:
        half = torch.bfloat16 if m_NRC.is_cuda else torch.float32
        mix = _compiled_mix() if m_NRC.is_cuda and self._compiles else nesterov
        return mix(g_NRC, m_NRC, mu, divisor, skip, self._arithmetic or half)

    def _orthogonal(self, m_NRC: Tensor) -> Tensor:
        gang = self._gang
        if gang.world == 1:
            return orthogonalised(m_NRC)
        share = -(-len(m_NRC) // gang.world)
        own_NRC = m_NRC.new_zeros(share, *m_NRC.shape[1:])
        mine = m_NRC[gang.rank * share : (gang.rank + 1) * share]
        if len(mine):
            own_NRC[: len(mine)] = orthogonalised(mine)
        whole_NRC = m_NRC.new_empty(share * gang.world, *m_NRC.shape[1:])
        gang.gather_rows_later(own_NRC, whole_NRC).wait()
        return whole_NRC[: len(m_NRC)]


def nesterov(g_NRC: Tensor, m_NRC: Tensor, mu: Tensor, divisor: Tensor, skip: Tensor, dtype: torch.dtype) -> Tensor:
    """m <- mu m + (1 - mu) g in place; returns (1 - mu) g + mu m. Where the step is skipped, m stays m."""
    g_NRC = torch.where(skip, m_NRC, g_NRC / divisor)
    m_NRC.add_((g_NRC - m_NRC) * (1 - mu))
    return torch.lerp(g_NRC, m_NRC, mu).to(dtype)


@cache
def _compiled_mix() -> Any:
    """`nesterov` in one pass over memory."""
    return torch.compile(nesterov, dynamic=False)


KERNELS = True
"""Whether Newton-Schulz has kernels of its own where they run; a benchmark measures without."""


def _by_kernels(stack_NRC: Tensor) -> bool:
    if not (KERNELS and stack_NRC.is_cuda and stack_NRC.dtype == torch.bfloat16 and has_kernels()):
        return False
    from plmsae_cli.plm.fused import runs_on
    from plmsae_cli.training.optimizers.newton_schulz import takes

    return runs_on(stack_NRC.device) and takes(stack_NRC)


def orthogonalised(m_NRC: Tensor) -> Tensor:
    """`muon.orthogonalise` of each matrix of a stack, by products of all at once."""
    a, b, c = COEFFICIENTS
    tall = m_NRC.shape[1] > m_NRC.shape[2]
    x_NRC = m_NRC.mT.contiguous() if tall else m_NRC
    x_NRC = x_NRC / torch.linalg.vector_norm(x_NRC, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if _by_kernels(x_NRC):
        from plmsae_cli.training.optimizers.newton_schulz import iterated

        x_NRC = iterated(x_NRC)
        return x_NRC.mT.contiguous() if tall else x_NRC
    for _ in range(ITERATIONS):
        gram_NRR = x_NRC @ x_NRC.mT
        x_NRC = torch.baddbmm(x_NRC, torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c), x_NRC, beta=a)
    return x_NRC.mT.contiguous() if tall else x_NRC


def _part(group: Group, matrices: bool) -> Group:
    chosen = {n: p for n, p in group.parameters.items() if (group.linear_maps and p.ndim >= 2) == matrices}
    return replace(group, parameters=chosen)


def _stacks(group: Group) -> list[_Stack]:
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, parameter in group.parameters.items():
        by_shape.setdefault(tuple(parameter.shape[-2:]), []).append(name)
    stacks = []
    for shape, names in by_shape.items():
        parameters = tuple(group.parameters[name] for name in names)
        matrices = sum(p.numel() for p in parameters) // math.prod(shape)
        momentum = torch.zeros(matrices, *shape, device=parameters[0].device)
        stacks.append(_Stack(group, tuple(names), parameters, momentum))
    return stacks
