"""The largest of a batch against the plain selection; gradients of tokens with more pairs than are held at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.runtime.dist import Gang
from plmsae_cli.sae.batch_selection import keep_largest
from plmsae_cli.sae.fused import residual
from plmsae_cli.sae.fused.batch_top_k import BatchTopKEncoder
from plmsae_cli.sae.fused.pairs import ActivePairs
from plmsae_cli.sae.fused.residual import residuals
from plmsae_cli.sae.interface import one_process

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check(scores_BN: torch.Tensor, k: int) -> None:
    """What the kernels keep is what `keep_largest` keeps, token by token, latents ascending."""
    rows, n = scores_BN.shape
    encoder = BatchTopKEncoder(rows, n, k, DEVICE, Gang())
    encoder.select(scores_BN.to(DEVICE))
    acts_BN = scores_BN.float().relu()
    kept_BN, smallest = keep_largest(acts_BN, rows * k, 0, rows, one_process)
    token_P, latent_P = kept_BN.nonzero(as_tuple=True)
    pairs, total = encoder.pairs, len(token_P)
    assert pairs.offsets_B1 is not None
    assert pairs.token_P is not None
    assert pairs.offsets_B1.cpu().tolist() == [0, *kept_BN.sum(1).cumsum(0).tolist()]
    assert torch.equal(pairs.token_P[:total].cpu().long(), token_P)
    assert torch.equal(pairs.indices_P[:total].cpu().long(), latent_P)
    assert torch.equal(pairs.acts_P[:total].cpu(), acts_BN[kept_BN])
    keys_P = pairs.sort_keys_P.cpu().long() + pairs.shift
    assert torch.equal(keys_P[:total], latent_P)
    assert (keys_P[total:] == n).all()
    assert float(encoder.smallest) == float(smallest)


@settings(deadline=None, max_examples=12)
@given(
    rows=st.integers(1, 7),
    num_latents=st.integers(5, 70),
    k=st.integers(1, 5),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    centre=st.sampled_from([-40.0, 0.0]),
    seed=st.integers(0, 99),
)
def test_keeps_what_the_plain_selection_keeps(
    rows: int, num_latents: int, k: int, spread: float, centre: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores_BN = torch.randn(rows, num_latents, generator=generator) * spread + centre * (seed % 2)
    check(scores_BN.round().bfloat16(), k)  # many ties


def test_one_token_may_take_all() -> None:
    scores_BN = torch.full((6, 64), -1.0).bfloat16()
    scores_BN[4] = torch.arange(1, 65).bfloat16()
    check(scores_BN, 4)


@pytest.mark.parametrize("num_latents", [300, 70_000])
def test_wide_dictionaries(num_latents: int) -> None:
    generator = torch.Generator().manual_seed(0)
    check(torch.randn(3, num_latents, generator=generator).bfloat16(), 16)


@pytest.mark.parametrize("groups", [1, 3])
def test_residuals_of_tokens_of_any_number_of_pairs_are_the_formulas(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token for each way to go: none, one of every size that is held at once, full ones, and more than are held."""
    monkeypatch.setattr(residual, "PROGRAMS", 2)  # some of which take several tokens of a list
    generator = torch.Generator().manual_seed(1)
    counts, n, d = [0, 7, 16, 17, 40, 128, 129, 300], 320, 48
    rows = len(counts)
    active_BN = torch.zeros(rows, n, dtype=torch.bool)
    for row, count in enumerate(counts):
        active_BN[row, torch.randperm(n, generator=generator)[:count]] = True
    z_BN = torch.where(active_BN, torch.rand(rows, n, generator=generator) + 0.5, 0.0).bfloat16()
    x_BD, w_ND = (torch.randn(shape, generator=generator).bfloat16() for shape in ((rows, d), (n, d)))
    prefixes = [n // 8, n // 2, n][-groups:]

    token_P, latent_P = active_BN.nonzero(as_tuple=True)
    pairs = ActivePairs.places(len(token_P), n, DEVICE, tokens=rows)
    assert pairs.offsets_B1 is not None
    pairs.acts_P.copy_(z_BN[active_BN])
    pairs.indices_P.copy_(latent_P)
    pairs.offsets_B1[1:].copy_(torch.tensor(counts).cumsum(0))
    residual_BGD = torch.zeros(rows, groups, d, dtype=torch.bfloat16, device=DEVICE)
    slope_P, energy_2B = torch.zeros(len(token_P), device=DEVICE), torch.zeros(2, rows, device=DEVICE)
    prefixes_G = torch.tensor(prefixes, dtype=torch.int32, device=DEVICE)
    out = (residual_BGD, slope_P, energy_2B)
    given = (x_BD.to(DEVICE), w_ND.to(DEVICE), pairs, prefixes_G)
    residuals(*given, *out, most_held=128, smallest=16, void=torch.ones((), dtype=torch.int32, device=DEVICE))
    assert not any(tensor.any() for tensor in out)
    residuals(*given, *out, most_held=128, smallest=16)

    x, w, z = x_BD.double(), w_ND.double(), z_BN.double()
    own_BGD = torch.stack([x - z[:, :size] @ w[:size] for size in prefixes], 1)
    want_BGD = own_BGD.flip(1).cumsum(1).flip(1)
    group_N = sum((torch.arange(n) >= size).long() for size in prefixes[:-1]) + torch.zeros(n, dtype=torch.long)
    want_P = (want_BGD[token_P, group_N[latent_P]] * w[latent_P]).sum(1)
    squares_BG = own_BGD.square().sum(2)

    def check(ours: torch.Tensor, want: torch.Tensor) -> None:
        torch.testing.assert_close(ours.double().cpu(), want, rtol=0.02, atol=0.01 * float(want.abs().max()))

    for row in range(rows):
        check(residual_BGD[row], want_BGD[row])
        if counts[row]:
            check(slope_P.cpu()[token_P == row], want_P[token_P == row])
    check(energy_2B, torch.stack([squares_BG.sum(1), squares_BG[:, -1]]))
