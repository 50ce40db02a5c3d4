"""Whether what torch's compiler made has the gradients of plain PyTorch.

torch 2.11 compiled a model whose parameters below one operation had gradients of zero, and said nothing: the loss fell, to where
the last layer alone can bring it. So where kernels are made, before the first step that they take, both passes are set side
by side on a part of the data. Weights are moved for that and put back bit for bit: at the start of a training many gradients
are zero by right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import Parameter

from plmsae_cli.config.errors import UserError
from plmsae_cli.plm.attention import Documents
from plmsae_cli.training.masking import Masked

FEW = 2048
"""Tokens of a pack that the plain pass has: it keeps more in memory than a compiled one."""
ROUNDING = 2.0**-10
"""Of bfloat16, on average: a plain pass with weights moved so far again, relatively, says how much of a gradient is rounding."""
DRAWS = 3
"""Times that they are: by chance one may move a gradient little."""
GROSS, MARGIN = 0.5, 10.0
"""A gradient is wrong where it is so far off: as a share of its length, and in units of that rounding."""
FEWEST = 64
"""Numbers in a gradient of which that can be said: a sum that nearly cancels may come out as anything."""
ZERO_MARGIN = 2.0
"""A gradient of zeros is wrong where the plain one is so long in units of that rounding; two that are rounding are 1.4 apart."""
_NAMED = 3
_WRONG, _ZERO = 1.0, 2.0

Loss = Callable[[], Tensor]
Agree = Callable[[Tensor], Tensor]
"""The largest over all ranks of each number of a tensor."""


def demand_same_gradients(
    parameters: Mapping[str, Parameter], compiled: Loss, plain: Loss, agree: Agree = lambda alone: alone
) -> None:
    """Let both compute a loss and its gradients; weights are afterwards what they were. Waits for the device.

    A gradient that is mathematically zero, or all rounding, is never held against the compiler, and neither is one that is not
    finite. Where there is no memory for the plain pass, nothing is looked at. With `agree`, ranks raise together.

    Raises:
        UserError: gradients of the compiled pass are zero, or others, where the plain one's are not.
    """
    parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    those = list(parameters.values())
    figures = _figures(those, compiled, plain)
    if those[0].is_cuda:
        torch.cuda.empty_cache()  # what is trained next to this finds the memory as it was
    verdicts_P = torch.zeros(len(those), device=those[0].device)
    for place, (parameter, (apart, length, found, rounding)) in enumerate(zip(those, figures, strict=False)):
        if not math.isfinite(apart + length + found + rounding):
            continue
        gross = parameter.numel() >= FEWEST and apart > max(GROSS * length, MARGIN * rounding)
        if gross or (found == 0.0 and length > ZERO_MARGIN * rounding):
            verdicts_P[place] = _ZERO if found == 0.0 else _WRONG
    found_P = agree(verdicts_P).tolist()
    wrong = {name: verdict == _ZERO for name, verdict in zip(parameters, found_P, strict=True) if verdict}
    if wrong:
        raise _error(wrong, len(those))


def _figures(parameters: list[Parameter], compiled: Loss, plain: Loss) -> list[list[float]]:
    """Of each parameter how far its gradients are apart, how long the plain one and the compiled one are, and how far rounding
    moves the plain one. Nothing where there is no memory for it."""
    with _drawn(parameters):
        ours = torch.autograd.grad(compiled(), parameters, materialize_grads=True)
        if parameters[0].is_cuda:
            torch.cuda.empty_cache()  # what the plain pass loads besides tensors finds room too
        try:
            theirs = torch.autograd.grad(plain(), parameters, materialize_grads=True)
            rounding_P = torch.zeros(len(parameters), device=parameters[0].device)
            for draw in range(1, DRAWS + 1):
                _move(parameters, draw, lambda weight, noise: weight * noise * ROUNDING)
                moved = torch.autograd.grad(plain(), parameters, materialize_grads=True)
                rounding_P = torch.maximum(rounding_P, _apart(moved, theirs))
                del moved
        except torch.OutOfMemoryError:
            return []
    lengths = (torch.stack([gradient.norm() for gradient in each]) for each in (theirs, ours))
    return torch.stack([_apart(ours, theirs), *lengths, rounding_P], dim=1).tolist()


def _apart(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    return torch.stack([(one - other).norm() for one, other in zip(ours, theirs, strict=True)])


def _error(wrong: Mapping[str, bool], total: int) -> UserError:
    """`wrong`: of each parameter whether its gradient is zero."""
    named = ", ".join(list(wrong)[:_NAMED]) + (", ..." if len(wrong) > _NAMED else "")
    zeros = sum(wrong.values())
    how = "are zero" if zeros == len(wrong) else f"are wrong ({zeros} of them zero)"
    return UserError(
        f"compiled by torch {torch.__version__}, the gradients of {len(wrong)} of {total} parameters ({named}) {how}; PyTorch "
        "without its compiler has others, so this training would learn next to nothing",
        "a fault of this version's compiler: install another version of torch, or train without it by train.compile: false "
        "(slower, and with more memory)",
    )


@contextmanager
def _drawn(parameters: list[Parameter]) -> Iterator[None]:
    """Within, weights are moved so far that a gradient reaches all of them."""
    # On the host: a GPU may have no room left.
    kept = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        _move(parameters, 0, lambda weight, noise: 0.5 * noise / (weight.shape[-1] ** 0.5 if weight.ndim > 1 else 5.0))
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)


@torch.no_grad()
def _move(parameters: list[Parameter], seed: int, by: Callable[[Tensor, Tensor], Tensor]) -> None:
    # A generator of its own: the process's stays where it is.
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        parameter.add_(by(parameter, noise))


def few_documents(pack: Masked) -> tuple[Masked, Masked]:
    """(the first documents of a pack alone, the whole pack with weight at their places alone): of both the same loss.

    Documents do not see one another, so the gradients are the same too.
    """
    edges = pack.documents.cu_seqlens.tolist()
    num = next((n for n, end in enumerate(edges) if end >= FEW), len(edges) - 1)
    inside_M = pack.places_M < edges[num]
    whole = pack._replace(weights_M=inside_M.to(pack.weights_M.dtype))
    lengths = None if pack.documents.lengths is None else tuple(b - a for a, b in pairwise(edges[: num + 1]))
    few = whole._replace(
        inputs_T=pack.inputs_T[: edges[num]],
        documents=Documents(pack.documents.cu_seqlens[: num + 1], pack.documents.max_len, lengths),
        places_M=pack.places_M[inside_M],
        targets_M=pack.targets_M[inside_M],
        weights_M=whole.weights_M[inside_M],
    )
    return few, whole
