from __future__ import annotations

import pytest
import torch

from plmsae_cli.sae.fused.top_k import TopKEncoder, members_of_group
from plmsae_cli.sae.selection import top_k

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize(
    ("num_latents", "k"), [(1000, 7), (512, 32), (4096, 16), (100, 100), (70, 3), (2048, 1), (70_000, 5)]
)
def test_the_k_largest_with_ties_to_the_lowest_latent(num_latents: int, k: int, coarse: bool) -> None:
    generator = torch.Generator().manual_seed(num_latents + k)
    scores_BN = (torch.randn(6, num_latents, generator=generator) * 4).bfloat16()
    if coarse:
        scores_BN = scores_BN.round()
    scores_BN[0] = -1.0  # nothing above 0
    scores_BN[1, 3:] = -2.0  # fewer above 0 than k
    scores_BN[2] = 5.0  # everything ties
    encoder = TopKEncoder(6, num_latents, k, DEVICE)
    encoder.select(scores_BN.to(DEVICE), 0)

    want = top_k(scores_BN.float(), k)
    indices_BK, order_BK = want.indices_BK.sort(dim=1)
    acts_BK = want.acts_BK.gather(1, order_BK)
    assert torch.equal(encoder.pairs.indices_P.view(-1, encoder.k).cpu().long(), indices_BK)
    assert torch.equal(encoder.pairs.acts_P.view(-1, encoder.k).cpu(), acts_BK)
    keys_BK = torch.where(acts_BK > 0, indices_BK, num_latents)
    assert torch.equal(encoder.pairs.sort_keys_P.cpu().long() + encoder.pairs.shift, keys_BK.flatten())


def test_encoding_by_tiles_is_the_product_and_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plmsae_cli.sae.fused.top_k.TILE_SCORES", 128 * 64)
    generator = torch.Generator().manual_seed(0)
    x_BD, w_ND, b_N = (
        torch.randn(shape, generator=generator).bfloat16().to(DEVICE) for shape in ((130, 16), (64, 16), (64,))
    )
    encoder = TopKEncoder(130, 64, 4, DEVICE)
    assert encoder.tile == 128
    encoder(x_BD, w_ND, b_N)
    want = torch.addmm(b_N, x_BD, w_ND.t()).float().relu().topk(4, dim=1).values.sort(dim=1).values
    torch.testing.assert_close(encoder.pairs.acts_P.view(-1, encoder.k).sort(dim=1).values, want, rtol=0.01, atol=0.01)


def test_groups_keep_both_lists_short() -> None:
    assert members_of_group(10_240, 32) == 16
    assert members_of_group(2**20, 64) == 128
    assert members_of_group(64, 64) == 1
