"""Clusters find relatives, and no cluster is on both sides."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.clusters import choose_method, cluster, halves
from plmsae_cli.store.split import split_hash

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def families(number: int, members: int, length: int) -> tuple[list[str], list[int]]:
    """Random proteins, and copies of each with a tenth of the residues changed."""
    chosen = random.Random(0)
    sequences, owner = [], []
    for family in range(number):
        first = chosen.choices(LETTERS, k=length)
        for _ in range(members):
            sequences.append("".join(c if chosen.random() > 0.1 else chosen.choice(LETTERS) for c in first))
            owner.append(family)
    order = chosen.sample(range(len(sequences)), len(sequences))
    return [sequences[p] for p in order], [owner[p] for p in order]


@pytest.mark.parametrize("method", ["mmseqs", "kmer"])
def test_relatives_are_together_and_strangers_apart(method: str) -> None:
    if method == "mmseqs" and shutil.which("mmseqs") is None:
        pytest.skip("MMseqs2 is not installed")
    sequences, owner = families(5, 4, 120)
    found = cluster(sequences, method)
    groups = {frozenset(np.flatnonzero(found == name).tolist()) for name in set(found.tolist())}
    assert groups == {frozenset(p for p, one in enumerate(owner) if one == family) for family in range(5)}


def test_of_equal_representatives_the_longest_is_joined() -> None:
    chosen = random.Random(0)
    sequences, wanted = [], []
    for n in range(12):
        longer, shorter = ("".join(chosen.choices(LETTERS, k=length)) for length in (60, 59))
        sequences += [shorter, longer, longer[:20] + shorter[:20]]
        wanted += [3 * n, 3 * n + 1, 3 * n + 1]
    assert cluster(sequences, "kmer").tolist() == wanted
    assert cluster(["MK", "MK", "MKV"], "kmer").tolist() == [0, 0, 2], "what has no word of five is its own word"


@pytest.mark.parametrize("method", ["mmseqs", "kmer"])
def test_a_protein_that_is_not_known_has_no_relatives(method: str) -> None:
    if method == "mmseqs" and shutil.which("mmseqs") is None:
        pytest.skip("MMseqs2 is not installed")
    (known,) = families(1, 1, 60)[0]
    assert cluster(["", known, "", known], method).tolist() in ([0, 1, 2, 1], [0, 3, 2, 3])


def test_a_wanted_program_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert choose_method("auto") == "kmer"
    with pytest.raises(UserError, match="mmseqs is not installed"):
        choose_method("mmseqs")


@settings(deadline=None, max_examples=50)
@given(
    names=st.lists(st.integers(0, 12), min_size=1, max_size=40),
    share=st.sampled_from([0.2, 0.5]),
    seed=st.integers(0, 99),
)
def test_halves_are_whole_clusters_whatever_the_order(names: list[int], share: float, seed: int) -> None:
    hashes = np.array([split_hash(str(i)) for i in range(len(names))], dtype=np.uint64)
    sizes = np.arange(1, len(names) + 1, dtype=np.int64)
    groups = np.array(names)
    side = halves(groups, hashes, sizes, share)
    assert all(len(set(side[groups == name].tolist())) == 1 for name in names)
    order = np.random.default_rng(seed).permutation(len(names))
    assert np.array_equal(halves(groups[order], hashes[order], sizes[order], share), side[order])
    # Each cluster goes to the side that lags, so neither is off by more than the largest.
    largest = max(int(sizes[groups == name].sum()) for name in names)
    assert abs(int(sizes[side].sum()) - share * int(sizes.sum())) <= largest
