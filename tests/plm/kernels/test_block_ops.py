"""The operations of the UNet's blocks against plain arithmetic in float64, gradients included; on a CPU interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plmsae_cli.plm import attention, block_ops, flash, products, unet
from plmsae_cli.plm.attention import Documents, _attention_by_document
from plmsae_cli.plm.gradients import EPSILON, rms_norm
from plmsae_cli.plm.rotary import Rotary, rotate
from plmsae_cli.plm.unet import UNet
from plmsae_cli.plm.unet_config import UNetConfig

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
CLOSE = 2e-2 if CUDA else 2e-5
LENGTHS = (5, 130, 0, 65, 1, 63)  # 264 tokens: the last tile of every kind is a part of one
TOKENS, WIDTH, HEADS, HIDDEN = sum(LENGTHS), 128, 2, 200
pytestmark = pytest.mark.skipif(
    CUDA and torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU with descriptors of tiles"
)


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, DTYPE)


def far(found: Tensor, exact: Tensor) -> float:
    """Root of the mean squared error beside that of what is right."""
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


def stream() -> tuple[Documents, Tensor]:
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    edges = torch.tensor([0, *ends, TOKENS], dtype=torch.int32, device=DEVICE)
    documents = Documents(edges, max(LENGTHS), LENGTHS)
    documents = documents._replace(tiles=flash.tile_table(edges, TOKENS))
    return documents, documents.locate(TOKENS)[1].int()


@pytest.mark.parametrize("tile", [products.Tile(128, 256, 64, 8, 3), products.Tile(64, 128, 32, 4, 2)], ids=str)
def test_products_with_what_follows_them(tile: products.Tile) -> None:
    x, up = draw(TOKENS, WIDTH, seed=0), draw(HIDDEN, WIDTH, seed=1, scale=0.1)
    grad, down = draw(TOKENS, WIDTH, seed=2), draw(WIDTH, HIDDEN, seed=3, scale=0.1)
    squares = torch.stack([x.float()[:, :50].square().sum(-1), x.float()[:, 50:].square().sum(-1)], 1)
    norm = (x.double().square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    z = (norm * (x.double() @ up.double().T)).relu()
    squared = products.up(x, squares, up, tile)
    assert far(squared, z.square()) < CLOSE
    slopes = products.slopes(grad, down, squared, squares, tile)
    assert far(slopes, norm * 2 * squared.double().sqrt() * (grad.double() @ down.double())) < CLOSE
    total, parts = products.added(x, squared, down, tile)
    exact = x.double() + squared.double() @ down.double().T
    assert far(total, exact) < CLOSE
    assert far(parts.sum(1), exact.square().sum(-1)) < CLOSE
    assert parts.shape[1] == -(-WIDTH // tile.columns)
    assert torch.equal(slopes, products.slopes(grad, down, squared, squares, tile))


def test_the_feed_forward_layer_and_its_gradients() -> None:
    x, up = draw(TOKENS, WIDTH, seed=0), draw(HIDDEN, WIDTH, seed=1, scale=0.1)
    down, weights = draw(WIDTH, HIDDEN, seed=2, scale=0.1), draw(TOKENS, WIDTH, seed=3)
    inputs = [t.requires_grad_() for t in (x, up, down)]
    found = block_ops.feed(x, block_ops.squares_of(x), up, down)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    a, b, c = exact
    expected = a + F.relu(rms_norm(a) @ b.T).square() @ c.T
    assert far(found, expected) < CLOSE
    ours = torch.autograd.grad((found * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights.double()).sum(), exact)
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.dtype == DTYPE
        assert far(mine, right) < CLOSE


@pytest.mark.parametrize(
    ("head_dim", "mixed", "window", "cap"),
    [(64, True, 0, 0.0), (64, True, 20, 0.0), (128, False, 0, 0.0), (128, True, 70, 2.0)],
)
def test_attention_and_its_gradients(
    head_dim: int, mixed: bool, window: int, cap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = flash.Shape(64, 32, 4, 2)
    monkeypatch.setitem(flash.DESCRIBED, 64, flash.Shapes(small, small, small))
    monkeypatch.setitem(flash.DESCRIBED, 128, flash.Shapes(small._replace(own=128), small._replace(own=128), small))
    documents, position = stream()
    tiles = documents.tiles
    assert tiles is not None
    assert products.fits(HEADS, head_dim)
    width = HEADS * head_dim
    rope = Rotary(head_dim).to(DEVICE)(torch.arange(max(LENGTHS), device=DEVICE))
    token = torch.randint(0, 33, (TOKENS,), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    x, weight, out = draw(TOKENS, width, seed=0), draw(3, width, width, seed=1, scale=0.2), draw(width, width, seed=2)
    table, weights = draw(33, width, seed=3), draw(TOKENS, width, seed=4)
    inputs = [t.requires_grad_() for t in (x, weight, out, *([table] if mixed else []))]
    found, squares = block_ops.attend(
        x, weight, out, table if mixed else None, token, position, rope, tiles, HEADS, window, cap
    )
    exact = [t.detach().double().requires_grad_() for t in inputs]
    qkv = torch.einsum("td,ked->tke", rms_norm(exact[0]), exact[1]).view(TOKENS, 3, HEADS, head_dim)
    turns = rope[0].double()[position.long()], rope[1].double()[position.long()]
    values = qkv[:, 2] + (exact[3][token].view(TOKENS, HEADS, head_dim) if mixed else 0)
    q, k = (rotate(rms_norm(qkv[:, i]), turns) for i in (0, 1))
    made = _attention_by_document(q, k, values, LENGTHS, window or None, cap or None)
    expected = exact[0] + made.flatten(1) @ exact[2].T
    assert far(found, expected) < CLOSE
    assert far(squares.sum(1), expected.square().sum(-1)) < CLOSE
    ours = torch.autograd.grad((found * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights.double()).sum(), exact)
    for mine, right in zip(ours, theirs, strict=True):
        assert far(mine, right) < CLOSE


@pytest.mark.parametrize("compiled", [False, True])
def test_a_trunk_by_kernels_has_the_gradients_of_the_plain_one(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    documents, _ = stream()
    model = UNet(UNetConfig(4, WIDTH, HEADS, expansion_ratio=2)).to(DEVICE)
    model.init_weights(0)
    model.compute = DTYPE
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(DEVICE))
    tokens = torch.randint(4, 24, (TOKENS,), generator=generator).to(DEVICE)
    weights = draw(TOKENS, WIDTH, seed=3)
    rope = model.rotary(documents.locate(TOKENS)[1])

    def run(kernels: bool) -> tuple[Tensor, dict[str, Tensor]]:
        if CUDA:
            monkeypatch.setattr(attention, "BLOCK_OPS", kernels)
        else:
            monkeypatch.setattr(unet, "has_block_ops", attention.constant(lambda *_: kernels))
        torch.compiler.reset()
        model.zero_grad()
        trunk: Any = torch.compile(model.trunk, backend="aot_eager", dynamic=False) if compiled else model.trunk
        last = trunk(tokens, documents, rope, None)
        (last * weights).sum().backward()
        return last.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain, right = run(False)
    by_kernels, found = run(True)
    assert far(by_kernels, plain) < CLOSE
    assert found.keys() == right.keys()
    for name, gradient in right.items():
        assert gradient.norm() > 0, name
        assert far(found[name], gradient) < 10 * CLOSE, name
