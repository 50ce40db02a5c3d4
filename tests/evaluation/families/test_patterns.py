"""Patterns of hand-drawn activations, and counts against a slow, obvious implementation."""

from __future__ import annotations

from itertools import groupby, pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.evaluation.families.patterns import LONGEST_GAP, PATTERNS, Patterns
from plmsae_cli.sae.interface import Latents


def every(z_RN: torch.Tensor) -> Latents:
    return Latents(z_RN, torch.arange(z_RN.shape[1]).expand(len(z_RN), -1))


def drawn(*lines: str) -> torch.Tensor:
    """`#` fires, one line a latent."""
    return torch.tensor([[float(c == "#") for c in line] for line in lines]).T


def classes(lengths: list[int], *lines: str) -> list[str]:
    patterns = Patterns(len(lines))
    z_RN = drawn(*lines)
    patterns.add(every(z_RN), torch.ones(len(lines)), torch.tensor(lengths))
    return [PATTERNS[p] for p in patterns.classes().tolist()]


def test_each_pattern_is_told() -> None:
    blank = "." * 100
    assert classes(
        [100],
        blank,
        "#" * 81 + "." * 19,
        "#......" * 11 + "." * 23,  # ten gaps of 7
        "#......" * 10 + "." * 30,  # only nine
        "#" * 20 + "." * 80,
        "#" * 21 + "." * 79,
        "#" * 50 + "." * 50,
        "#" * 51 + "." * 49,
        "#" * 80 + "." * 20,  # 80 % is not more than 80 %
    ) == ["dead", "whole", "periodic", "point", "short", "medium", "medium", "long", "long"]


def test_runs_end_with_their_protein_and_residues_of_other_proteins_do_not_dilute() -> None:
    # Two proteins of ten: nine of ten residues of the first, none of the second.
    assert classes([10, 10], "#" * 9 + "." * 11) == ["whole"]
    # A run over the border is two runs of one residue.
    assert classes([10, 10], "." * 9 + "##" + "." * 9) == ["point"]


def test_activations_of_a_seventh_of_the_maximum_do_not_fire() -> None:
    patterns = Patterns(1)
    patterns.add(every(torch.tensor([[0.15], [0.151], [0.0]])), torch.ones(1), torch.tensor([3]))
    assert patterns.active_N.tolist() == [1]


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_counts_are_those_of_loops(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    fires_RN = torch.rand(sum(lengths), 3, generator=generator) < torch.tensor([0.03, 0.4, 0.9])
    patterns = Patterns(3)
    patterns.add(every(fires_RN.float()), torch.ones(3), torch.tensor(lengths))
    wanted = Patterns(3)
    for n in range(3):
        first = 0
        for length in lengths:
            row = fires_RN[first : first + length, n].tolist()
            first += length
            place, starts = 0, []
            for value, members in groupby(row):
                size = len(list(members))
                if value:
                    starts.append(place)
                    wanted.runs_N4[n, sum(size > edge for edge in (1, 20, 50))] += 1
                place += size
            for one, other in pairwise(starts):
                wanted.gaps_NG[n, other - one if other - one <= LONGEST_GAP else 0] += 1
            wanted.active_N[n] += sum(row)
            wanted.length_N[n] += length * any(row)
    for name, value in patterns.state().items():
        assert torch.equal(value, wanted.state()[name]), name
