"""Products of the UNet's training step with what follows them in their epilogues, as Triton kernels with descriptors.

The stream's norm is a number a row, so it is applied to a product's result: rms_norm(x) Wᵀ = n (x Wᵀ), n = 1 / sqrt(mean x^2 +
eps). Gradients of results are stored times n, so that both further products, with x and with W, take them as they are, and
the normed stream is never stored. Squares of ReLU are stored alone: their roots are what the backward wants.

Shape letters: T tokens of the pack, D residual width, F feed-forward width, P parts of a sum over a row, H heads, Dh width
of a head, N columns of a product's result, K its inner dimension.
"""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from plmsae_cli.plm import product_kernels as kernels
from plmsae_cli.plm.gradients import EPSILON

NEIGHBOURS = 8
"""Rows of tiles that run together, so that they find each other's operands in the cache."""


class Tile(NamedTuple):
    """How a product runs."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    resident: int = 1
    """Programs on a multiprocessor."""


UP = Tile(128, 256, 64, 8, 3)
SLOPES = Tile(256, 128, 64, 8, 3)
ADDED = Tile(128, 256, 64, 8, 3)
QUERIES = Tile(128, 256, 64, 8, 3)


@cache
def _processors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def multiprocessors(like: Tensor) -> int:
    """Of a tensor's GPU; some few where kernels are interpreted."""
    return _processors(like.device.index) if like.is_cuda else 4


def _launch(kernel: Any, tile: Tile, num_rows: int, wide: int, like: Tensor, *given: Any, **fixed: Any) -> None:
    programs = min(multiprocessors(like) * tile.resident, triton.cdiv(num_rows, tile.rows) * wide)
    with torch.cuda.device_of(like):  # Triton launches on the current one
        kernel[(programs,)](
            *given, num_rows, EPSILON, programs=programs, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
            NEIGHBOURS=NEIGHBOURS, num_warps=tile.warps, num_stages=tile.stages, **fixed,
        )  # fmt: skip


def _parts(squares_TP: Tensor) -> dict[str, int]:
    parts = squares_TP.shape[1]
    return {"PARTS": parts, "PARTS_BLOCK": triton.next_power_of_2(parts)}


def _view(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, [rows, columns])


def up(x_TD: Tensor, squares_TP: Tensor, weight_FD: Tensor, tile: Tile = UP) -> Tensor:
    """relu(n x Wᵀ)^2 [T, F], with the norm n of each row by the sum of its `squares`, float32; D and F multiples of 8."""
    (num_rows, depth), width = x_TD.shape, weight_FD.shape[0]
    out_TF = x_TD.new_empty(num_rows, width)
    _launch(
        kernels.up_tiles, tile, num_rows, triton.cdiv(width, tile.columns), x_TD,
        _view(x_TD, tile.rows, tile.depth), _view(weight_FD, tile.columns, tile.depth), squares_TP,
        _view(out_TF, tile.rows, tile.columns), width=width, depth=depth, **_parts(squares_TP),
    )  # fmt: skip
    return out_TF


def slopes(
    grad_TD: Tensor,
    weight_DF: Tensor,
    squared_TF: Tensor,
    squares_TP: Tensor,
    tile: Tile = SLOPES,
) -> Tensor:
    """What `up` gave back through the matrix after it: n 2 sqrt(squared) grad W [T, F]."""
    (num_rows, depth), width = grad_TD.shape, weight_DF.shape[1]
    out_TF = squared_TF.new_empty(num_rows, width)
    _launch(
        kernels.slopes_tiles, tile, num_rows, triton.cdiv(width, tile.columns), grad_TD,
        _view(grad_TD, tile.rows, tile.depth), _view(weight_DF, tile.depth, tile.columns), squared_TF, squares_TP,
        _view(out_TF, tile.rows, tile.columns // 2), width=width, depth=depth, **_parts(squares_TP),
    )  # fmt: skip
    return out_TF


def added(x_TD: Tensor, a_TF: Tensor, weight_DF: Tensor, tile: Tile = ADDED) -> tuple[Tensor, Tensor]:
    """(x + a Wᵀ [T, D], parts of the sums of its squares over rows, float32 [T, P])."""
    (num_rows, depth), width = a_TF.shape, weight_DF.shape[0]
    out_TD, wide = torch.empty_like(x_TD), triton.cdiv(width, tile.columns)
    squares_TP = x_TD.new_empty(num_rows, wide, dtype=torch.float32)
    _launch(
        kernels.added_tiles, tile, num_rows, wide, x_TD,
        _view(a_TF, tile.rows, tile.depth), _view(weight_DF, tile.columns, tile.depth), x_TD,
        _view(out_TD, tile.rows, tile.columns // 2), squares_TP, width=width, depth=depth,
    )  # fmt: skip
    return out_TD, squares_TP


def fits(num_heads: int, head_dim: int, tile: Tile = QUERIES) -> bool:
    """Whether `queries` has tiles for such heads."""
    return head_dim in (64, 128) and num_heads % _together(head_dim, tile) == 0


def _together(head_dim: int, tile: Tile) -> int:
    """Heads of a tile."""
    return min(2, tile.columns // head_dim)


def queries(
    x_TD: Tensor,
    squares_TP: Tensor,
    weight_3DD: Tensor,
    table_VD: Tensor | None,
    tokens_T: Tensor,
    position_T: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    tile: Tile = QUERIES,
) -> tuple[Tensor, Tensor]:
    """(q, k and v [T, 3, H, Dh], what n x Wᵀ was multiplied with, times n, to become normed q and k, float32 [T, 2 H]).

    q and k are normed and turned by the tables' rows at `position`, fp32 [L, 1, Dh / 2]; v has the token's row of the table
    added. `tokens`, `position`: int32 or int64.
    """
    num_rows, depth = x_TD.shape
    width = depth // num_heads
    assert fits(num_heads, width, tile)
    tile = tile._replace(columns=width * _together(width, tile))
    out = x_TD.new_empty(num_rows, 3, num_heads, width)
    scales = squares_TP.new_empty(num_rows, 2 * num_heads)
    mixed = table_VD is not None
    views = (
        _view(x_TD, tile.rows, tile.depth), _view(weight_3DD.flatten(0, 1), tile.columns, tile.depth), squares_TP,
        _view(out.view(num_rows, -1), tile.rows, width),
    )  # fmt: skip
    fixed = {"heads": num_heads, "depth": depth, "HALF": width // 2, **_parts(squares_TP)}
    _launch(
        kernels.queries_tiles, tile, num_rows, 2 * depth // tile.columns, x_TD, *views, scales, position_T, cos, sin, **fixed
    )  # fmt: skip
    _launch(
        kernels.values_tiles, tile, num_rows, depth // tile.columns, x_TD, *views, table_VD if mixed else x_TD, tokens_T,
        MIXED=mixed, **fixed,
    )  # fmt: skip
    return out, scales
