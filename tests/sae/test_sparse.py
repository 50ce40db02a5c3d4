from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.sae.sparse import Pairs, attach_encoder, sparse_decode


def problem(seed: int, rows: int, k: int, num_latents: int, d: int) -> tuple[Pairs, dict[str, torch.Tensor]]:
    """Random float64 tensors and distinct latents of each row."""
    generator = torch.Generator().manual_seed(seed)
    indices_BK = torch.stack([torch.randperm(num_latents, generator=generator)[:k] for _ in range(rows)])
    shapes = {"acts": (rows * k,), "x": (rows, d), "w": (num_latents, d), "b": (num_latents,), "b_dec": (d,)}
    tensors = {
        name: torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }
    return Pairs.of_rows(indices_BK, num_latents), tensors


SHAPES = {
    "rows": st.integers(1, 5),
    "k": st.integers(1, 4),
    "num_latents": st.integers(4, 9),
    "d": st.integers(1, 6),
    "seed": st.integers(0, 2**32),
}


@settings(deadline=None, max_examples=15)
@given(**SHAPES)
def test_decode_is_the_dense_product(rows: int, k: int, num_latents: int, d: int, seed: int) -> None:
    pairs, t = problem(seed, rows, k, num_latents, d)
    z_BN = torch.zeros(rows, num_latents, dtype=torch.float64)
    z_BN = z_BN.scatter(1, pairs.indices_P.view(rows, k), t["acts"].view(rows, k))
    torch.testing.assert_close(sparse_decode(t["acts"], t["w"], pairs), z_BN @ t["w"])
    assert torch.autograd.gradcheck(lambda acts, w: sparse_decode(acts, w, pairs), (t["acts"], t["w"]))


@settings(deadline=None, max_examples=15)
@given(**SHAPES)
def test_encoder_gradients_are_the_dense_ones(rows: int, k: int, num_latents: int, d: int, seed: int) -> None:
    pairs, t = problem(seed, rows, k, num_latents, d)
    inputs = [t["x"], t["w"], t["b"], t["b_dec"]]
    dense_P = ((t["x"] - t["b_dec"]) @ t["w"].T + t["b"]).relu().gather(1, pairs.indices_P.view(rows, k)).flatten()
    sparse_P = attach_encoder(dense_P.detach(), *inputs, pairs)
    assert torch.equal(sparse_P, dense_P)
    weights_P = t["acts"].detach()
    for ours, dense in zip(
        torch.autograd.grad(sparse_P, inputs, weights_P),
        torch.autograd.grad(dense_P, inputs, weights_P),
        strict=True,
    ):
        torch.testing.assert_close(ours, dense)


def test_decode_in_several_bags_a_row() -> None:
    indices_P = torch.tensor([2, 0, 1, 2])
    pairs = Pairs(indices_P, torch.tensor([0, 2, 2, 3]), torch.tensor([0, 1, 1, 3, 4]), 3)
    w_ND = torch.eye(3, dtype=torch.float64).requires_grad_()
    acts_P = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    assert sparse_decode(acts_P, w_ND, pairs).tolist() == [[0, 0, 1], [0, 0, 0], [2, 3, 0], [0, 0, 4]]
    assert torch.autograd.gradcheck(lambda acts, w: sparse_decode(acts, w, pairs), (acts_P, w_ND))


def test_results_repeat_bit_for_bit(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    indices_BK = torch.randint(0, 8, (512, 1), generator=generator).to(device)  # hot latents: long sums
    pairs = Pairs.of_rows(indices_BK, 64)
    weights_P = torch.randn(512, generator=generator).to(device)
    rows_RD = torch.randn(512, 33, generator=generator).to(device)
    first = pairs.sum_by_latent(weights_P, rows_RD)
    for _ in range(5):
        assert torch.equal(Pairs.of_rows(indices_BK, 64).sum_by_latent(weights_P, rows_RD), first)
    want = torch.zeros(64, 33, device=device).index_add_(0, indices_BK[:, 0], weights_P[:, None] * rows_RD)
    torch.testing.assert_close(first, want, rtol=1e-5, atol=1e-5)
