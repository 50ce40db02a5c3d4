"""The kernels against attention written out document by document in float64; on a CPU by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plmsae_cli.plm.attention import Documents, _attention_by_document
from plmsae_cli.plm.flash import TILE, packed_attention, tile_table

LENGTHS = (5, 130, 0, 64, 1, 200)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CLOSE = {"rtol": 2e-2, "atol": 2e-2} if DEVICE.type == "cuda" else {"rtol": 1e-3, "atol": 1e-5}


def packed(lengths: tuple[int, ...], empty: int = 2) -> Tensor:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return torch.tensor([0, *ends, *[sum(lengths)] * empty], dtype=torch.int32, device=DEVICE)


def test_tiles_cover_every_row_once_and_the_longest_documents_come_first() -> None:
    table = tile_table(packed(LENGTHS), sum(LENGTHS)).tolist()
    rows = [row for first, _, end in table for row in range(first, min(first + TILE, end))]
    assert sorted(rows) == list(range(sum(LENGTHS)))
    assert all(first >= begin for first, begin, end in table if end)
    lengths = [end - begin for _, begin, end in table]
    assert lengths == sorted(lengths, reverse=True)
    assert len(table) == sum(LENGTHS) // TILE + len(LENGTHS) + 2


# Each width has shapes of its own on a GPU; in the interpreter they are one program, which is slow.
WIDTHS = (16, 32, 64, 128) if DEVICE.type == "cuda" else (16,)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (20, 0.0), (150, 2.0)])
def test_kernels_are_attention_and_its_gradients(window: int, cap: float, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(LENGTHS), 3, 2, width, generator=generator).to(DEVICE, DTYPE)
    weights = torch.randn(sum(LENGTHS), 2, width, generator=generator).to(DEVICE)
    inputs = [x.detach().requires_grad_() for x in qkv.unbind(1)]  # views with gaps, as one product for the three gives
    exact = [x.detach().double().requires_grad_() for x in inputs]
    tiles = tile_table(packed(LENGTHS), sum(LENGTHS))
    found = packed_attention(*inputs, tiles, window, cap)[0]
    expected = _attention_by_document(*exact, LENGTHS, window or None, cap or None)
    torch.testing.assert_close(found.double(), expected, **CLOSE)
    ours = torch.autograd.grad((found * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights.double()).sum(), exact)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), right, **CLOSE)


def test_documents_make_their_tiles_once() -> None:
    documents = Documents(packed(LENGTHS), max(LENGTHS))
    assert documents.tiled(sum(LENGTHS)).tiles is None or DEVICE.type == "cuda"
    known = documents._replace(tiles=torch.zeros(1, 3))
    assert known.tiled(7) is known
