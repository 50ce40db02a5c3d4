"""The kernels of Newton-Schulz against products in float64; on a CPU by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plmsae_cli.plm.products import Tile
from plmsae_cli.training.optimizers import grouped_muon, newton_schulz
from plmsae_cli.training.optimizers.base import Group
from plmsae_cli.training.optimizers.grouped_muon import GroupedMuon
from plmsae_cli.training.optimizers.newton_schulz import general, symmetric

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
CLOSE = 1e-2 if CUDA else 1e-5
pytestmark = pytest.mark.skipif(
    CUDA and torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU with descriptors of tiles"
)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE) / 16


def far(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("columns", [256, 264])
def test_products_of_stacks(columns: int) -> None:
    x = draw(3, 256, columns, seed=0)
    exact = x.double()
    gram = symmetric(x)
    assert far(gram, exact @ exact.mT) < CLOSE
    assert torch.equal(gram, gram.mT)
    square = symmetric(gram, alpha=2.0, beta=-3.0)
    assert far(square, 2 * gram.double() @ gram.double() - 3 * gram.double()) < CLOSE
    assert torch.equal(square, square.mT)
    assert far(general(gram, x, 0.5), gram.double() @ exact + 0.5 * exact) < CLOSE
    small = Tile(64, 128, 32, 4, 2)
    assert far(general(gram, x, 0.5, small), gram.double() @ exact + 0.5 * exact) < CLOSE
    assert torch.equal(general(gram, x, 0.5), general(gram, x, 0.5))


@pytest.mark.parametrize(("rows", "columns"), [(128, 136), (136, 128)])
def test_an_update_of_muon_by_kernels_is_the_plain_one(
    rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def iterated(x_NRC: Tensor) -> Tensor:
        calls.append(x_NRC.shape)
        return real(x_NRC)

    real = newton_schulz.iterated
    monkeypatch.setattr(newton_schulz, "iterated", iterated)
    updated = []
    for kernels in (False, True):
        monkeypatch.setattr(grouped_muon, "_by_kernels", lambda stack, on=kernels: on)
        weight = torch.nn.Parameter(draw(2, rows, columns, seed=0).float())
        weight.grad = draw(2, rows, columns, seed=1).float()
        optimizer = GroupedMuon([Group("all", {"w": weight}, linear_maps=True)], 0.95, 0, (0.9, 0.95), 1e-8)
        with torch.no_grad():
            optimizer.update(0.1, None, torch.zeros((), dtype=torch.bool, device=DEVICE))
        updated.append(weight.detach())
    assert calls == [(2, 128, 136)]
    plain, by_kernels = updated
    # In bfloat16 the polynomial, which does not converge to a point, spreads roundings further than one product does.
    assert float((by_kernels - plain).norm() / plain.norm()) < (5e-2 if CUDA else 1e-5)


def test_stacks_whose_tiles_two_matrices_would_share_are_left_to_the_library() -> None:
    assert newton_schulz.takes(torch.empty(2, 128, 136))
    assert not newton_schulz.takes(torch.empty(2, 64, 136))
    assert not newton_schulz.takes(torch.empty(2, 128, 132))
