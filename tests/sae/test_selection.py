from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.sae import selection
from plmsae_cli.sae.selection import encode_top_k, top_k

QUICK = settings(deadline=None, max_examples=40)


def definition(scores_BN: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ReLU first, then a stable sort: the lowest index of equal scores comes first."""
    values, indices = scores_BN.relu().sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


@QUICK
@given(st.data())
def test_top_k_is_the_stable_sort(device: torch.device, data: st.DataObject) -> None:
    num_latents = data.draw(st.integers(1, 200))
    k = data.draw(st.integers(1, num_latents))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    levels = data.draw(st.sampled_from([2, 5, 1000]))  # few levels: most scores tie
    scores_BN = torch.randint(-levels, levels, (7, num_latents), generator=generator) / 4
    acts_BK, indices_BK = top_k(scores_BN.to(device), k)
    want_acts, want_indices = definition(scores_BN, k)
    assert torch.equal(acts_BK.cpu(), want_acts)
    assert torch.equal(indices_BK.cpu(), want_indices)


@QUICK
@given(st.data())
def test_encoding_in_tiles_is_top_k_of_the_product(device: torch.device, data: st.DataObject) -> None:
    # Small integers: products are exact in float32, whatever the order of summation, and tie often.
    num_latents = data.draw(st.sampled_from([1, 3, 16, 37, 96, 128]))
    k = data.draw(st.integers(1, min(num_latents, 9)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    x_BD, w_ND, b_N = (
        torch.randint(-3, 4, shape, generator=generator).float().to(device)
        for shape in [(11, 5), (num_latents, 5), (num_latents,)]
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TILE_SCORES_CPU", "TILE_SCORES_CUDA"):
            patch.setattr(selection, name, data.draw(st.sampled_from([1, 4 * num_latents, 2**20])))
        acts_BK, indices_BK = encode_top_k(x_BD, w_ND, b_N, k)
    want_acts, want_indices = definition(x_BD @ w_ND.T + b_N, k)
    assert torch.equal(acts_BK, want_acts)
    assert torch.equal(indices_BK, want_indices)


def test_negative_scores_are_zeros_in_order_of_index(device: torch.device) -> None:
    acts_BK, indices_BK = top_k(torch.tensor([[-1.0, -0.0, -5.0, 2.0, -2.0, -3.0]], device=device), 3)
    assert acts_BK.tolist() == [[2.0, 0.0, 0.0]]
    assert indices_BK.tolist() == [[3, 0, 1]]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_is_never_hidden(device: torch.device, sign: float) -> None:
    scores_BN = torch.arange(64.0).repeat(2, 1)
    scores_BN[1, 17] = torch.tensor(float("nan")).copysign(torch.tensor(sign))
    acts_BK, indices_BK = top_k(scores_BN.to(device), 4)
    assert acts_BK[0].isfinite().all()
    assert acts_BK[1, 0].isnan()
    assert indices_BK[1, 0] == 17
