"""The largest of a batch against the plain selection; gradients of tokens with more pairs than are held at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.runtime.dist import Gang
from plmsae_cli.sae.batch_selection import keep_largest
from plmsae_cli.sae.fused.batch_top_k import BatchTopKEncoder
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
def test_tokens_of_many_pairs_have_the_residuals_of_few(groups: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows, n, d, k = 5, 200, 48, 20
    scores_BN = torch.randn(rows, n, generator=generator).bfloat16()
    scores_BN[3] += 2.0  # it takes most of the places
    x_BD, w_ND = (torch.randn(shape, generator=generator).bfloat16().to(DEVICE) for shape in ((rows, d), (n, d)))
    prefixes_G = torch.tensor([n // 8, n // 2, n][-groups:], dtype=torch.int32, device=DEVICE)
    found = []
    for most_held in (16, 256):
        encoder = BatchTopKEncoder(rows, n, k, DEVICE, Gang())
        encoder.select(scores_BN.to(DEVICE))
        out = (
            torch.zeros(rows, groups, d, dtype=torch.bfloat16, device=DEVICE),
            torch.zeros(rows * k, device=DEVICE),
            torch.zeros(2, rows, device=DEVICE),
        )
        residuals(x_BD, w_ND, encoder.pairs, prefixes_G, *out, most_held)
        found.append(out)
    assert encoder.pairs.offsets_B1 is not None
    assert int(encoder.pairs.offsets_B1.diff().max()) > 64, "one token is to have many pairs"
    for few, many in zip(*found, strict=True):
        torch.testing.assert_close(few.float(), many.float(), rtol=0.02, atol=0.02 * float(many.float().abs().max()))
