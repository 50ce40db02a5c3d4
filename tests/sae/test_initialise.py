from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.sae.initialise import Start, geometric_median, initialise, survey
from plmsae_cli.sae.matryoshka import MatryoshkaTopK
from plmsae_cli.sae.topk import TopK


def summed_distance(x_MD: torch.Tensor, point_D: torch.Tensor) -> float:
    return float((x_MD - point_D).norm(dim=1).sum())


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 5))
def test_no_neighbour_is_nearer_to_all_rows(seed: int, rows: int, d: int) -> None:
    """The summed distance is convex: a point is its minimum if no small step in any direction lowers it."""
    generator = torch.Generator().manual_seed(seed)
    x_MD = torch.randn(rows, d, dtype=torch.float64, generator=generator) ** 3  # heavy tails
    median_D = geometric_median(x_MD, tolerance=1e-12)
    best = summed_distance(x_MD, median_D)
    directions = torch.randn(50, d, dtype=torch.float64, generator=generator)
    for step_D in 1e-3 * directions / directions.norm(dim=1, keepdim=True):
        assert summed_distance(x_MD, median_D + step_D) >= best - 1e-9


def test_one_outlier_moves_the_mean_and_not_the_median() -> None:
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    x_MD = torch.cat([corners.repeat(5, 1), torch.tensor([[1e6, 0.0]])])
    assert x_MD.mean(0)[0] > 1e4
    assert geometric_median(x_MD).norm() < 0.2


@pytest.mark.parametrize(
    "x_MD",
    [
        torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0], [0.0, 0.0]]),
        torch.tensor([[2.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),
    ],
)
def test_a_row_can_be_the_median(x_MD: torch.Tensor) -> None:
    """The mean is the row at the origin, where Weiszfeld's weights are undefined, and the median too."""
    assert x_MD.mean(0).tolist() == [0.0, 0.0]
    assert geometric_median(x_MD).tolist() == [0.0, 0.0]


def test_a_row_met_on_the_way_is_left() -> None:
    """The mean of these rows is one of them, and not their median: a fixed point of the plain iteration."""
    x_MD = torch.tensor([[0.0], [-1.0], [-1.2], [-1.4], [3.6]], dtype=torch.float64)
    assert abs(float(geometric_median(x_MD, tolerance=1e-12)) + 1.0) < 1e-6


def test_identical_rows() -> None:
    assert geometric_median(torch.full((4, 3), 2.0)).tolist() == [2.0, 2.0, 2.0]


def test_start(device: torch.device) -> None:
    sample_MD = torch.randn(100, 8, generator=torch.Generator().manual_seed(3)) ** 3 + 5
    model, again, other = (TopK(8, 24, k=2).to(device) for _ in range(3))
    initialise(model, 7, sample_MD.to(device), "random")
    initialise(again, 7, sample_MD.to(device), "random")
    initialise(other, 8, sample_MD.to(device), "random")
    assert torch.equal(model.w_enc_ND, model.w_dec_ND)
    assert model.w_dec_ND.data_ptr() != model.w_enc_ND.data_ptr()
    torch.testing.assert_close(model.w_dec_ND.norm(dim=1), torch.ones(24, device=device))
    assert not model.b_enc_N.any()
    torch.testing.assert_close(model.b_dec_D.detach().cpu(), geometric_median(sample_MD), rtol=1e-4, atol=1e-4)
    assert torch.equal(model.w_dec_ND, again.w_dec_ND)
    assert not torch.equal(model.w_dec_ND, other.w_dec_ND)
    # The same draw as on a CPU, bit for bit.
    reference = TopK(8, 24, k=2)
    initialise(reference, 7, sample_MD)
    assert torch.equal(model.w_dec_ND.cpu(), reference.w_dec_ND)


@pytest.mark.parametrize("start", ["fitted", "data"])
@pytest.mark.parametrize("kind", [TopK, MatryoshkaTopK])
def test_no_other_length_of_the_encoder_starts_with_a_smaller_error(kind: type[TopK], start: Start) -> None:
    """The error is a parabola in the factor: it rises alike to both sides of its minimum, and vanishes in its slope."""
    sample_MD = torch.randn(5000, 16, generator=torch.Generator().manual_seed(1)) ** 3 + 2
    model = kind(16, 64, k=8)
    initialise(model, 0, sample_MD, start)
    w_enc_ND = model.w_enc_ND.detach().clone()

    @torch.no_grad()
    def error(factor: float) -> float:
        model.w_enc_ND.copy_(factor * w_enc_ND)
        return float((model(sample_MD) - sample_MD).double().square().sum())

    best = error(1.0)
    for step in (0.01, 0.1, 0.5):
        assert error(1 - step) > best
        assert error(1 + step) == pytest.approx(error(1 - step), rel=1e-5)
    assert error(1 / float(w_enc_ND.norm(dim=1).mean())) > 1.05 * best, "unit rows overshoot"


def test_nothing_active_leaves_the_encoder_as_it_is() -> None:
    assert survey(TopK(4, 8, k=2), torch.randn(10, 4)) == (1.0, 0.0)


@pytest.mark.parametrize(("dimensions", "fits"), [(16, True), (2, False)])
def test_auto_fits_where_every_latent_wins_somewhere(dimensions: int, fits: bool) -> None:
    """Of 200 directions in 16 dimensions few are ever among the four nearest to a sample that fills two of them."""
    sample_MD = torch.zeros(5000, 16)
    sample_MD[:, :dimensions] = torch.randn(5000, dimensions, generator=torch.Generator().manual_seed(4))
    auto, random, fitted = (TopK(16, 200, k=4) for _ in range(3))
    initialise(auto, 0, sample_MD)
    initialise(random, 0, sample_MD, "random")
    initialise(fitted, 0, sample_MD, "fitted")
    assert torch.equal(auto.w_enc_ND, (fitted if fits else random).w_enc_ND)
    assert not torch.equal(fitted.w_enc_ND, random.w_enc_ND)


@pytest.mark.parametrize(("silent", "fits"), [(0.0099, True), (0.01, False)])
def test_auto_fits_where_fewer_than_a_hundredth_are_silent(
    silent: float, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plmsae_cli.sae.initialise.survey", lambda *_: (0.5, silent))
    model = TopK(4, 8, k=2)
    initialise(model, 0, torch.randn(10, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(model.w_enc_ND, model.w_dec_ND * (0.5 if fits else 1.0))


def test_data_rows_point_from_the_centre_to_rows_of_the_sample() -> None:
    sample_MD = torch.randn(40, 6, generator=torch.Generator().manual_seed(2)) + 3
    model, other = TopK(6, 24, k=2), TopK(6, 24, k=2)
    initialise(model, 0, sample_MD, "data")
    initialise(other, 1, sample_MD, "data")
    directions_MD = torch.nn.functional.normalize(sample_MD - model.b_dec_D, dim=1)
    nearest = (model.w_dec_ND @ directions_MD.T).max(1)
    torch.testing.assert_close(nearest.values, torch.ones(24))
    assert len(set(nearest.indices.tolist())) == 24, "each row of the sample at most once"
    assert not torch.equal(model.w_dec_ND, other.w_dec_ND)


def test_a_sample_that_is_too_small_or_at_the_centre_is_filled_up_with_random_directions() -> None:
    sample_MD = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    model, random = TopK(3, 8, k=2), TopK(3, 8, k=2)
    initialise(model, 0, sample_MD, "data")
    initialise(random, 0, sample_MD)
    along_N = model.w_dec_ND[:, 0].abs() == 1
    assert along_N.tolist().count(True) == 2
    assert along_N[:3].tolist().count(True) == 2
    assert torch.equal(model.w_dec_ND[~along_N], random.w_dec_ND[~along_N])
