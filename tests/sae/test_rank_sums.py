"""What adding up bfloat16 gradients over ranks loses against a float32 sum: the figures of docs/design.md."""

from __future__ import annotations

import pytest
import torch


def ring(terms_WN: torch.Tensor) -> torch.Tensor:
    """As a ring adds: each rank adds its term to what comes by, and hands on bfloat16."""
    total_N = terms_WN[0]
    for term_N in terms_WN[1:]:
        total_N = (total_N.float() + term_N.float()).bfloat16()
    return total_N


@pytest.mark.parametrize(("world", "bound"), [(1, 0.0018), (2, 0.0026), (4, 0.0033), (8, 0.0042)])
def test_the_error_of_a_sum_in_bfloat16(world: int, bound: float) -> None:
    terms_WN = torch.randn(world, 200_000, generator=torch.Generator().manual_seed(world))
    exact_N = terms_WN.double().sum(0)
    found_N = ring(terms_WN.bfloat16()).double()
    error = float((found_N - exact_N).norm() / exact_N.norm())
    assert 0.9 * bound < error < bound
