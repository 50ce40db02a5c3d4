"""Eight bits a number: against the formula, its bound, and what others do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.store.fs import Store
from plmsae_cli.store.quantise import SCALE_BYTES, Quantiser


def outlying(rows: int, d: int, seed: int) -> torch.Tensor:
    """Rows as language models have them: dimensions far from zero, and some a hundred times the others."""
    generator = torch.Generator().manual_seed(seed)
    sizes_D = torch.ones(d)
    sizes_D[: max(1, d // 50)] = 100.0
    return torch.randn(rows, d, generator=generator) * sizes_D + 3 * sizes_D


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 40), d=st.integers(1, 70), seed=st.integers(0, 9))
def test_the_error_is_within_half_a_step_of_the_row(rows: int, d: int, seed: int) -> None:
    x_RD = outlying(rows, d, seed)
    mean_D, deviation_D = torch.linspace(-2, 2, d), torch.linspace(0.5, 90, d)
    quantiser = Quantiser(mean_D, deviation_D)
    stored_RW = quantiser.encode(x_RD)
    assert stored_RW.dtype == torch.int8
    assert stored_RW.shape == (rows, d + SCALE_BYTES) == (rows, quantiser.width)
    z_RD = (x_RD - mean_D) / deviation_D
    # Half a level of max |z| / 127, and what rounding that to half precision (2^-11) costs the largest codes.
    bound_R1 = z_RD.abs().amax(1, keepdim=True).clamp(min=1e-5) if rows else torch.zeros(0, 1)
    bound_R1 = bound_R1 * (0.5 / 127 + 2.0**-11) * 1.01
    error_RD = (quantiser.decode(stored_RW) - x_RD).abs() / deviation_D
    assert (error_RD <= bound_R1 + 1e-6 * z_RD.abs() + 1e-5).all()


def test_the_formula_number_by_number() -> None:
    quantiser = Quantiser(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 4.0]))
    row = torch.tensor([[1.0 + 2.0 * 127, 4.0 * 50.4]])  # z = 127, 50.4: the scale is 1
    stored = quantiser.encode(row)
    assert stored[0, :2].tolist() == [127, 50]
    assert stored[0, 2:].view(torch.float16).item() == 1.0
    assert quantiser.decode(stored).tolist() == [[255.0, 200.0]]


def test_outlying_dimensions_cost_nothing_where_a_scale_a_row_alone_is_lost() -> None:
    x_RD = outlying(20_000, 640, 1)
    mean_D, deviation_D = x_RD[:10_000].mean(0), x_RD[:10_000].std(0)
    held_RD = x_RD[10_000:]
    quantiser = Quantiser(mean_D, deviation_D)
    scale_R1 = held_RD.abs().amax(1, keepdim=True) / 127
    alone_RD = (held_RD / scale_R1).round() * scale_R1

    def unexplained(kept_RD: torch.Tensor) -> float:
        """Mean over dimensions of error / variance: an outlier counts as any other."""
        return float(((kept_RD - held_RD).square().mean(0) / held_RD.var(0)).mean())

    ours = unexplained(quantiser.decode(quantiser.encode(held_RD)))
    assert ours < 1.2e-4  # (max |z| / 127)^2 / 12 at max |z| about 4
    assert unexplained(alone_RD) > 100 * ours


def test_zero_rows_constant_dimensions_and_numbers_that_are_not_finite() -> None:
    quantiser = Quantiser(torch.tensor([5.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 1.0]))
    rows = torch.tensor([[5.0, 1.0, 0.0], [5.0, 2.0, 1e-12], [5.0, float("nan"), 0.0], [5.0, float("inf"), 0.0]])
    decoded = quantiser.decode(quantiser.encode(rows))
    assert decoded[0].tolist() == [5.0, 1.0, 0.0]
    assert decoded[1].tolist() == pytest.approx([5.0, 2.0, 0.0], abs=1e-3)
    assert decoded[2].isnan().any()
    assert not decoded[3].isfinite().all()


def test_folded_is_decode_then_normalise() -> None:
    x_RD = outlying(100, 32, 3)
    quantiser = Quantiser(x_RD.mean(0), x_RD.std(0))
    stored_RW = quantiser.encode(x_RD)
    mean_D, scale = torch.randn(32), 0.37
    wanted_RD = (quantiser.decode(stored_RW).double() - mean_D) * scale
    torch.testing.assert_close(
        quantiser.folded(mean_D, scale).decode(stored_RW).double(), wanted_RD, rtol=1e-4, atol=1e-4
    )


def test_any_split_of_the_rows_gives_the_same_bytes(tmp_path: Path) -> None:
    x_RD = outlying(40_000, 8, 4)
    quantiser = Quantiser(x_RD.mean(0), x_RD.std(0), 40_000)
    quantiser.write(Store(), str(tmp_path / "calibration.safetensors"))
    again = Quantiser.read(Store(), str(tmp_path / "calibration.safetensors"))
    assert again.count == 40_000
    parts = torch.cat([again.encode(x_RD[:17_001]), again.encode(x_RD[17_001:])])
    assert torch.equal(quantiser.encode(x_RD), parts)
