"""Whether what torch's compiler made has the gradients of plain PyTorch.

torch 2.11 compiled a model whose parameters below one operation had gradients of zero, and said nothing: the loss fell, to where
the last layer alone can bring it. So once a start, where kernels are made and before any step counts, both passes are set side
by side on a part of the data. Weights are drawn anew for that and put back bit for bit: at the start of a training many
gradients are zero by right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
GROSS = 0.5
"""Difference that no rounding explains, over the norm of the gradient."""
ROUNDING = 2.0**-8
"""Of bfloat16: a plain pass with weights moved so far, relatively, says how much of a gradient is rounding."""
MARGIN = 10.0
"""How many times that a difference has to be."""
_NAMED = 3

Loss = Callable[[], Tensor]


def demand_same_gradients(parameters: Mapping[str, Parameter], compiled: Loss, plain: Loss) -> None:
    """Let both compute a loss and its gradients; weights are afterwards what they were. Waits for the device.

    A gradient that is mathematically zero, or all rounding, is never held against the compiler, and neither is one that is not
    finite. Where there is no memory for the plain pass, nothing is looked at.

    Raises:
        UserError: gradients of the compiled pass are zero, or others, where the plain one's are not.
    """
    parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    those = list(parameters.values())
    with _drawn(those):
        ours = torch.autograd.grad(compiled(), those, materialize_grads=True)
        try:
            theirs = torch.autograd.grad(plain(), those, materialize_grads=True)
            _move(those, lambda weight, noise: weight * noise * ROUNDING)
            moved = torch.autograd.grad(plain(), those, materialize_grads=True)
        except torch.OutOfMemoryError:
            return
    figures = [
        torch.stack([(a - b).norm(), b.norm(), (c - b).norm(), a.norm()])
        for a, b, c in zip(ours, theirs, moved, strict=True)
    ]
    wrong: dict[str, bool] = {}
    for name, (apart, length, rounding, found) in zip(parameters, torch.stack(figures).tolist(), strict=True):
        if apart > max(GROSS * length, MARGIN * rounding):
            wrong[name] = found == 0.0
    if wrong:
        raise _error(wrong, len(those))


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
    kept = [parameter.detach().cpu().clone() for parameter in parameters]  # on the host: a GPU may have no room left
    try:
        _move(parameters, lambda weight, noise: noise / (weight.shape[-1] ** 0.5 if weight.ndim > 1 else 10.0))
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)


@torch.no_grad()
def _move(parameters: list[Parameter], by: Callable[[Tensor, Tensor], Tensor]) -> None:
    # A generator of its own: the process's stays where it is.
    generator = torch.Generator(parameters[0].device).manual_seed(0)
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
