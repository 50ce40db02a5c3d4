"""The kernels between attentions against plain arithmetic in float64; on a CPU by Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plmsae_cli.plm import fused, reader
from plmsae_cli.plm.alphabet import encode, pack
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.plm.flash import packed_attention, packed_attention_backward, tile_table
from plmsae_cli.plm.rotary import Rotary, rotate

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.bfloat16, torch.float16] if CUDA else [torch.float32]
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}
pytestmark = pytest.mark.skipif(
    CUDA and torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU with descriptors of tiles"
)


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "depth", "width"), [(130, 64, 256), (300, 48, 200), (1, 8, 8)])
def test_product_with_gelu(num_rows: int, depth: int, width: int, dtype: torch.dtype) -> None:
    x, weight = draw(num_rows, depth, seed=0, dtype=dtype), draw(width, depth, seed=1, dtype=dtype)
    bias = draw(width, seed=2, dtype=dtype)
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    found = fused.linear_gelu(x, weight, bias).double()
    assert (found - exact).abs().max() <= ROUNDING[dtype] * exact.abs().max() + 6e-6


def test_gelu_is_within_what_its_docstring_says_and_flat_beyond() -> None:
    x = torch.linspace(-30, 30, 4096)[:, None].to(DEVICE, DTYPES[0])
    rows = torch.cat([x, x.new_zeros(len(x), 7)], dim=1)
    pick = torch.eye(8, device=DEVICE, dtype=DTYPES[0])
    found = fused.linear_gelu(rows, pick, pick.new_zeros(8))[:, 0].double()
    error = (found - F.gelu(x[:, 0].double())).abs()
    assert (error <= 6e-6 + ROUNDING[DTYPES[0]] * x[:, 0].double().abs()).all()
    assert (found[x[:, 0] < -4.75].abs() < 1e-5).all()


def test_gelu_of_what_is_far_below_and_of_what_is_no_number() -> None:
    rows = torch.zeros(4, 8, dtype=DTYPES[0], device=DEVICE)
    rows[:, 0] = torch.tensor([-1e3, -6e4, 6e4, float("nan")])
    pick = torch.eye(8, device=DEVICE, dtype=DTYPES[0])
    found = fused.linear_gelu(rows, pick, pick.new_zeros(8))[:, 0]
    assert (found[:2].abs() < 6e-6).all()
    assert found[2] == rows[2, 0]
    assert found[3].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 200, 1280])
def test_sum_and_its_norm(width: int, dtype: torch.dtype) -> None:
    x, change = (draw(5, width, seed=i, dtype=dtype) + 3 for i in range(2))
    weight, bias = draw(width, seed=2, dtype=dtype), draw(width, seed=3, dtype=dtype)
    total, normed = fused.add_norm(x, change, weight, bias)
    exact = x.double() + change.double()
    assert torch.equal(total, exact.to(dtype))
    expected = F.layer_norm(exact, (width,), weight.double(), bias.double())
    assert (normed.double() - expected).abs().max() <= 4 * ROUNDING[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 24])
def test_rotation_of_queries_and_keys_leaves_values(head_dim: int, dtype: torch.dtype) -> None:
    qkv = draw(70, 3, 2, head_dim, seed=0, dtype=dtype)
    position = (torch.arange(70, device=DEVICE) * 37) % 90
    tables = Rotary(head_dim).to(DEVICE)(torch.arange(90, device=DEVICE))
    rope = tables[0][position], tables[1][position]
    q, k, v = qkv.unbind(1)
    expected = torch.stack([rotate(q, rope), rotate(k, rope), v], 1)
    found = qkv.clone()
    fused.rotate_(found, tables, position)
    torch.testing.assert_close(found, expected, rtol=2 * ROUNDING[dtype], atol=1e-7)


@torch.no_grad()
def test_every_layer_is_that_of_the_plain_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """d 40 and heads of 10 are multiples of nothing that a tile is."""
    model = ESM2(ESM2Config(3, 40, 4))
    model.init_weights(0)
    model = model.to(DEVICE, DTYPES[0]).eval()
    packed = pack([encode(s) for s in ("MKTAYIAKQR", "GSHM" * 20, "A")], num_tokens=128, num_documents=6).to(DEVICE)
    plain = reader.Reader(model)
    plain._fused = None
    expected = dict(plain.layers(packed.tokens_T, packed.documents, range(4)))
    ours = reader.Reader(model)
    if not CUDA:
        monkeypatch.setattr(ours, "_fused", reader._Steps(fused.project, fused.between, fused.feed))
    found = dict(ours.layers(packed.tokens_T, packed.documents, range(4), compiled=True))
    assert ours.fused
    for layer, x_TD in expected.items():
        error = (found[layer].double() - x_TD.double()).norm() / x_TD.double().norm()
        assert error <= 4 * ROUNDING[DTYPES[0]] + 1e-5, layer


def launch_all(device: torch.device) -> list[Tensor]:
    x = draw(16, 16, seed=0, dtype=DTYPES[0]).to(device)
    qkv = draw(16, 3, 1, 16, seed=1, dtype=DTYPES[0]).to(device)
    position = torch.arange(16, device=device)
    fused.rotate_(qkv, Rotary(16).to(device)(position), position)
    cu_seqlens = torch.tensor([0, 16], dtype=torch.int32, device=device)
    q, k, v = qkv.unbind(1)
    mixed, lse = packed_attention(q, k, v, tile_table(cu_seqlens, 16), 0, 0.0)
    grads = packed_attention_backward(mixed, q, k, v, mixed, lse, tile_table(cu_seqlens, 16), 0, 0.0)
    return [fused.linear_gelu(x, x, x[0]), *fused.add_norm(x, x, x[0], x[1]), qkv, mixed, *grads]


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's launch asks for the current device alone."""
    guarded: list[torch.device] = []

    def device_of(tensor: Tensor, real: type[Any] = torch.cuda.device_of) -> Any:
        guarded.append(tensor.device)
        return real(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    first = launch_all(DEVICE)
    assert len(guarded) == 5
    if torch.cuda.device_count() > 1:
        other = launch_all(torch.device("cuda", 1))  # the current one is still 0
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, other, strict=True))
