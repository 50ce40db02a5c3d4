"""The sentence that names the bottleneck."""

from __future__ import annotations

import pytest

from plmsae_cli.training.profiling import bottleneck

TIMES = [("gemm", 3.0), ("a" * 70, 0.5), ("add", 0.5)]


@pytest.mark.parametrize(
    ("loader", "busy", "sentence"),
    [
        (0.0, None, "bottleneck: gemm, 75% of the CPU time"),
        (0.29, 0.9, "bottleneck: gemm, 75% of the GPU time"),
        (0.3, 0.9, "bottleneck: the loader; steps waited for data 30% of the time"),
        (0.9, 0.05, "bottleneck: the loader; steps waited for data 90% of the time"),
        (0.1, 0.4, "bottleneck: the host; the GPU computed 40% of the time"),
    ],
)
def test_the_first_cause_counts(loader: float, busy: float | None, sentence: str) -> None:
    assert bottleneck(TIMES, loader, busy) == sentence


def test_long_names_are_cut() -> None:
    assert bottleneck(TIMES[1:], 0.0, None) == f"bottleneck: {'a' * 57}..., 50% of the CPU time"
