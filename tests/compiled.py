"""What is compiled beside the same run eagerly: losses, and the gradient of every parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Of a gradient, relative to its norm."""
STACKED = ("_2", "_3DD", "_3ND", "skip_weights")
"""Endings of parameters whose parts along the first dimension are factors or matrices of their own."""


def gradients(loss: Tensor, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """Of each parameter; where none arrives, zeros, as an optimiser would see it."""
    found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def zero(grads: Mapping[str, Tensor]) -> list[str]:
    """Names of those that are zero everywhere, or in one of the parts that are stacked in them."""
    parts = {name: grad.unbind(0) if name.endswith(STACKED) else (grad,) for name, grad in grads.items()}
    return [name for name, those in parts.items() if not all(bool(part.any()) for part in those)]


def assert_as_eager(
    compiled: Callable[[], Tensor],
    eager: Callable[[], Tensor],
    parameters: Mapping[str, Parameter],
    error: float,
    loss_error: float | None = None,
) -> None:
    """Both give a loss: the same one, with the same gradients, none of which is zero."""
    expected_loss, found_loss = eager(), compiled()
    expected, found = gradients(expected_loss, parameters), gradients(found_loss, parameters)
    assert zero(expected) == [], "the example says nothing about these"
    assert zero(found) == [], "the compiler dropped these"
    torch.testing.assert_close(found_loss, expected_loss, rtol=error if loss_error is None else loss_error, atol=0)
    errors = {
        name: float((found[name].double() - grad.double()).norm() / grad.double().norm())
        for name, grad in expected.items()
    }
    assert {name: e for name, e in errors.items() if not e <= error} == {}
