"""What the plan says will be held, and what is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from plmsae_cli.evaluation.annotations.entries import Entry, Feature
from plmsae_cli.evaluation.expected import LOOKED, Sample, expected_sample
from plmsae_cli.evaluation.probes.planning import held, needed

FIT = """
import os, sys, torch
from plmsae_cli.evaluation.probes.features import Writer, read_sides
from plmsae_cli.evaluation.probes.fits import one_thread, probe
from plmsae_cli.store.fs import Store

folder, *numbers = sys.argv[1:]
rows, latents, active, d = map(int, numbers)
store = Store()
if not os.path.exists(folder):
    writer = Writer(store, folder, "protein", "0of1")
    for first in range(0, rows, 1000):
        index = torch.rand(1000, latents).argsort(1)[:, :active].sort(1).values
        row = torch.arange(1000).repeat_interleave(active)
        entries = {"row": row, "latent": index.flatten(), "value": torch.rand(len(row)), "raw": torch.randn(1000, d)}
        writer.add(first, entries)
    writer.close()
    sys.exit()
files = [f"{folder}/{name}" for name in os.listdir(folder)]
with one_thread():
    sides = read_sides(store, files, torch.arange(rows), torch.arange(rows) % 5 == 0, latents)
    probe(sides, torch.arange(rows) % 3 == 0, 100.0, 1000)
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(
    "shape",
    [
        (8000, 1536, 700, 64),
        pytest.param((30_000, 8192, 64, 64), marks=pytest.mark.slow),
        pytest.param((20_000, 512, 2, 1280), marks=pytest.mark.slow),
    ],
)
def test_the_prediction_is_what_is_held_at_most(tmp_path: Path, shape: tuple[int, int, int, int]) -> None:
    command = [sys.executable, "-c", FIT, str(tmp_path / "features"), *map(str, shape)]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(2):  # a process that makes the files, and one that reads them
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=settings)
    rows, latents, active, d = shape
    predicted = held(rows, rows * active, d, latents)
    peak = int(done.stdout) * 1024
    assert peak < predicted < 1.25 * peak


def proteins(lengths: list[int], annotated: bool) -> list[Entry]:
    features = (Feature("HELIX", 0, 2, ""),) if annotated else ()
    return [Entry("P", "A" * length, features) for length in lengths]


def test_a_sample_is_the_file_or_what_was_asked_for() -> None:
    short = proteins([100] * 10 + [0, 5000], annotated=False)
    assert expected_sample(short, 10_000, 1022) == Sample(10, 1000, False), "what is empty or too long does not count"
    assert expected_sample(short, 450, 1022) == Sample(5, 500, False), "whole proteins"
    assert expected_sample([], 450, 1022) == Sample(0, 0, False)
    many = proteins([1000] * (LOOKED // 1000) + [1] * 10, annotated=True)
    assert expected_sample(many, 3 * LOOKED, 1022) == Sample(3 * LOOKED // 1000, 3 * LOOKED, True), "the rest alike"
    plain = proteins([1000] * (LOOKED // 1000) + [1] * 10, annotated=False)
    assert expected_sample(plain, 3 * LOOKED, 1022).proteins == len(plain), "a FASTA is read to its end"


def test_without_annotations_proteins_alone_are_held() -> None:
    small, large = Sample(100, 25_000, False), Sample(100, 25_000, True)
    assert needed(small, True, 64, 8192, 32) < needed(large, True, 64, 8192, 32) == needed(large, False, 64, 8192, 32)
    every = needed(Sample(1000, 10_000_000, False), True, 64, 1024, 32)
    assert every == pytest.approx(held(1000, 1000 * 1024, 64, 1024), rel=1e-3), "of a long protein all latents"
    assert needed(Sample(0, 0, False), True, 64, 8192, 32) < 1e9
