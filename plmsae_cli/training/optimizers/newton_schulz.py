"""Newton-Schulz iterations of stacks of matrices as Triton kernels with descriptors, for bfloat16 from sm90 on.

X Xᵀ and its square are symmetric: the tiles on and above the diagonal are computed and each is stored twice. What is added to a
product is added in its epilogue, where cuBLAS's copies it first.

Shape letters: N matrices of a stack, R rows, C columns, R <= C.
"""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from plmsae_cli.plm.flash_kernels import halves
from plmsae_cli.plm.products import Tile, multiprocessors
from plmsae_cli.training.optimizers.muon import COEFFICIENTS, ITERATIONS

SYMMETRIC = Tile(128, 128, 32, 4, 3, 2)
GENERAL = Tile(128, 256, 64, 8, 3)


def takes(stack_NRC: Tensor) -> bool:
    """Whether stacks of this shape have tiles that no two matrices share."""
    _, rows, columns = stack_NRC.shape
    return rows % 128 == 0 and columns % 8 == 0


@triton.jit(do_not_specialize=["matrices"])
def _symmetric(
    x, y, out, added, alpha, beta, matrices, rows: tl.constexpr, depth: tl.constexpr, programs: tl.constexpr,
    ADDS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = rows // TILE
    each: tl.constexpr = wide * (wide + 1) // 2
    for tile in tl.range(tl.program_id(0), matrices * each, programs, flatten=True):
        # Row r of the triangle and row wide - 1 - r together have wide + 1 tiles.
        matrix, place = tile // each * rows, tile % each
        r, c = place // (wide + 1), place % (wide + 1)
        lower = c >= wide - r
        i = tl.where(lower, wide - 1 - r, r)
        j = tl.where(lower, c - 1, r + c)
        row, column = i * TILE, j * TILE
        total = tl.zeros([TILE, TILE], tl.float32)
        for k in range(0, depth, DEPTH):
            total = tl.dot(x.load([matrix + row, k]), y.load([matrix + column, k]).T, total)
        if ADDS:
            total = alpha * total + beta * added.load([matrix + row, column]).to(tl.float32)
        found = total.to(out.dtype)
        out.store([matrix + row, column], found)
        out.store([matrix + column, row], found.T)  # on the diagonal the same once more: products commute bit for bit


@triton.jit(do_not_specialize=["matrices"])
def _general(
    square, x, out, added, beta, matrices, rows: tl.constexpr, width: tl.constexpr, programs: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    high: tl.constexpr = rows // ROWS
    wide: tl.constexpr = (width + COLUMNS - 1) // COLUMNS
    for tile in tl.range(tl.program_id(0), matrices * high * wide, programs, flatten=True):
        matrix, place = tile // (high * wide) * rows, tile % (high * wide)
        row, column = matrix + place % high * ROWS, place // high * COLUMNS
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, rows, DEPTH):
            total = tl.dot(square.load([row, k]), x.load([matrix + k, column]), total)
        a, b = halves(total, ROWS, COLUMNS)
        lines = added + (row + tl.arange(0, ROWS))[:, None].to(tl.int64) * width
        for half in tl.static_range(2):
            start = column + half * (COLUMNS // 2)
            places = start + tl.arange(0, COLUMNS // 2)[None]
            before = tl.load(lines + places, mask=places < width, other=0.0).to(tl.float32)
            out.store([row, start], ((a if half == 0 else b) + beta * before).to(out.dtype))


def _view(stack_NRC: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(stack_NRC.flatten(0, 1), [rows, columns])


def symmetric(x_NRC: Tensor, alpha: float = 1.0, beta: float = 0.0, shape: Tile = SYMMETRIC) -> Tensor:
    """X Xᵀ [N, R, R]; with `beta`, alpha X X + beta X of symmetric matrices."""
    matrices, rows, depth = x_NRC.shape
    assert rows % shape.rows == 0
    out_NRR = x_NRC.new_empty(matrices, rows, rows)
    wide = rows // shape.rows
    programs = min(multiprocessors(x_NRC) * shape.resident, matrices * wide * (wide + 1) // 2)
    inner, outer = (shape.rows, shape.depth), (shape.rows, shape.rows)
    with torch.cuda.device_of(x_NRC):  # Triton launches on the current one
        _symmetric[(programs,)](
            _view(x_NRC, *inner), _view(x_NRC, *inner), _view(out_NRR, *outer),
            _view(x_NRC if beta else out_NRR, *outer), alpha, beta, matrices, rows, depth, programs,
            ADDS=beta != 0, TILE=shape.rows, DEPTH=shape.depth, num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return out_NRR


def general(square_NRR: Tensor, x_NRC: Tensor, beta: float, shape: Tile = GENERAL) -> Tensor:
    """S X + beta X [N, R, C]."""
    matrices, rows, width = x_NRC.shape
    assert rows % shape.rows == 0
    out_NRC = torch.empty_like(x_NRC)
    tiles = matrices * (rows // shape.rows) * triton.cdiv(width, shape.columns)
    programs = min(multiprocessors(x_NRC) * shape.resident, tiles)
    with torch.cuda.device_of(x_NRC):
        _general[(programs,)](
            _view(square_NRR, shape.rows, shape.depth), _view(x_NRC, shape.depth, shape.columns),
            _view(out_NRC, shape.rows, shape.columns // 2), x_NRC, beta, matrices, rows, width, programs,
            ROWS=shape.rows, COLUMNS=shape.columns, DEPTH=shape.depth,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return out_NRC


def iterated(x_NRC: Tensor) -> Tensor:
    """Five times X <- a X + (b A + c A^2) X with A = X Xᵀ; as `muon.orthogonalise`, from a stack already normalised."""
    a, b, c = COEFFICIENTS
    x_NRC = x_NRC.contiguous()
    for _ in range(ITERATIONS):
        x_NRC = general(symmetric(symmetric(x_NRC), alpha=c, beta=b), x_NRC, beta=a)
    return x_NRC
