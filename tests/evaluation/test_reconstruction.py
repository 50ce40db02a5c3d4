"""A pass over held-out rows against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from plmsae_cli.evaluation.fidelity import reconstruction, reconstruction_intervals
from plmsae_cli.sae.topk import TopK


class Rows:
    """Rows as `ActivationShards` gives them."""

    def __init__(self, rows_RD: Tensor) -> None:
        self.rows_RD = rows_RD
        self.d, self.dtype = rows_RD.shape[1], rows_RD.dtype

    def read(self, start: int, stop: int, device: torch.device) -> Tensor:
        return self.rows_RD[start:stop].to(device).float()


@pytest.fixture(scope="module")
def dictionary() -> TopK:
    model = TopK(16, 48, k=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.b_enc_N[:4] = -100.0  # never fire
        model.normalize_decoder()
    return model


@pytest.mark.parametrize("batch", [1, 7, 64, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_over_rows_against_brute_force(dictionary: TopK, batch: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    distinct = torch.randn(40, 16, generator=generator)
    # Every row several times, in and across batches: the largest activations are tied.
    rows_RD = distinct[torch.randint(40, (200,), generator=generator)].to(dtype)
    mean_D = rows_RD.float().mean(0) + 0.1
    lengths_P = torch.tensor([50, 3, 147])
    seen = reconstruction(dictionary, Rows(rows_RD), lengths_P, mean_D, batch)  # type: ignore[arg-type]
    with torch.inference_mode():
        # Row by row: a matrix product's last bit depends on the number of its rows.
        z_RN = torch.cat([dictionary.encode_dense(row[None].float()) for row in rows_RD])
        xhat_RD = z_RN.double() @ dictionary.w_dec_ND.double() + dictionary.b_dec_D
    x_RD = rows_RD.double()
    fvu = (x_RD - xhat_RD).square().sum() / (x_RD - mean_D.double()).square().sum()
    result = seen.figures.result()
    assert result["fvu"] == pytest.approx(float(fvu), rel=1e-5)
    assert result["tokens"] == 200
    owner_R = torch.arange(3).repeat_interleave(lengths_P)
    by_hand = [
        torch.ones(200), (x_RD - xhat_RD).square().sum(1), (x_RD - mean_D.double()).square().sum(1),
        torch.cosine_similarity(x_RD, xhat_RD, dim=1), (z_RN > 0).sum(1),
    ]  # fmt: skip
    for found_P, wanted_R in zip(seen.sums_5P, by_hand, strict=True):
        torch.testing.assert_close(
            found_P, torch.zeros(3).double().index_add_(0, owner_R, wanted_R.double()), rtol=1e-5, atol=0
        )
    assert result["l0_mean"] == pytest.approx(float((z_RN > 0).sum(1).double().mean()))
    assert torch.equal(seen.figures.firing_N.long(), (z_RN > 0).sum(0))
    torch.testing.assert_close(seen.figures.maximum_N, z_RN.amax(0))
    torch.testing.assert_close(seen.activation_N, z_RN.double().sum(0), rtol=1e-5, atol=1e-6)
    assert (seen.top_row_N[:4] == -1).all()
    for latent in range(48):
        top = z_RN[:, latent].max()
        expected = -1 if top == 0 else int((rows_RD == rows_RD[z_RN[:, latent].argmax()]).all(1).nonzero()[0])
        found = int(seen.top_row_N[latent])
        if found != expected:  # only rows that reach the maximum up to rounding may take its place
            assert z_RN[found, latent] == pytest.approx(float(top), rel=1e-6)
            assert batch > 1


def test_intervals_are_those_of_proteins_drawn_with_replacement() -> None:
    generator = torch.Generator().manual_seed(0)
    rows_P = torch.randint(20, 300, (40,), generator=generator).double()
    share_P = 0.05 + 0.2 * torch.rand(40, generator=generator, dtype=torch.float64)
    sums_5P = torch.stack([rows_P, share_P * rows_P, rows_P, 0.9 * rows_P, 32 * rows_P])
    found = reconstruction_intervals(sums_5P)
    # Where every residue is alike there is nothing to be unsure of.
    assert found["interval_cosine"] == pytest.approx([0.9, 0.9])
    assert found["interval_l0_mean"] == pytest.approx([32, 32])
    drawn = np.random.default_rng(1).integers(40, size=(4000, 40))
    error, variance = (sums_5P[v].numpy()[drawn].sum(1) for v in (1, 2))
    ends = np.quantile(error / variance, [0.025, 0.975])
    assert found["interval_fvu"] == pytest.approx(ends, abs=0.15 * (ends[1] - ends[0]))
