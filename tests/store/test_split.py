"""The split: a function of the sequence, within its bounds, never between equal sequences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from plmsae_cli.store.split import MIN_HELDOUT, heldout, split_hash

PINNED = 10998687071418926650
"""`split_hash("MKVL")`."""
HASHES = hnp.arrays(np.uint64, st.integers(0, 300), elements=st.integers(0, 2**64 - 1))
FEW_VALUES = hnp.arrays(np.uint64, st.integers(0, 300), elements=st.integers(0, 40).map(lambda i: i * 2**58))


def by_definition(hashes: np.ndarray, holdout: float) -> list[bool]:
    """In Python integers: the hashes below the limit, or the smallest 32; groups of equals; at most half."""
    values = [int(h) for h in hashes]
    if holdout == 0:
        return [False] * len(values)
    wanted = max(sum(v < holdout * 2**64 for v in values), 32)
    limit = -1
    for value in sorted(set(values)):
        if sum(v <= value for v in values) > len(values) // 2 or sum(v < value for v in values) >= wanted:
            break
        limit = value
    return [v <= limit for v in values]


@settings(deadline=None, max_examples=150)
@given(hashes=HASHES | FEW_VALUES, holdout=st.sampled_from([0.0, 1e-6, 0.01, 0.1, 0.3, 0.5, 0.9]))
def test_definition(hashes: np.ndarray, holdout: float) -> None:
    assert heldout(hashes, holdout).tolist() == by_definition(hashes, holdout)


@settings(deadline=None, max_examples=100)
@given(hashes=HASHES | FEW_VALUES, shares=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)))
def test_a_larger_share_only_adds(hashes: np.ndarray, shares: tuple[float, float]) -> None:
    small, large = (heldout(hashes, share) for share in sorted(shares))
    assert not (small & ~large).any()


@settings(deadline=None, max_examples=50)
@given(hashes=HASHES, seed=st.integers(0, 9))
def test_order_does_not_matter(hashes: np.ndarray, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(hashes))
    assert (heldout(hashes, 0.1)[order] == heldout(hashes[order], 0.1)).all()


def test_shares_of_many_proteins() -> None:
    hashes = np.array([split_hash(f"M{i}") for i in range(100_000)], np.uint64)
    for holdout in (0.01, 0.1, 0.4):
        share = heldout(hashes, holdout).mean()
        assert abs(share - holdout) < 4 * np.sqrt(holdout * (1 - holdout) / len(hashes))


@pytest.mark.parametrize(
    ("proteins", "expected"), [(0, 0), (1, 0), (2, 1), (10, 5), (63, 31), (64, 32), (1000, MIN_HELDOUT)]
)
def test_floor_and_half(proteins: int, expected: int) -> None:
    hashes = np.array([split_hash(f"K{i}") for i in range(proteins)], np.uint64)
    assert heldout(hashes, 1e-9).sum() == expected
    assert not heldout(hashes, 0.0).any()


def test_the_hash_is_pinned() -> None:
    """Data and models made earlier rely on these: a change of the split needs a change of the format."""
    assert split_hash("MKVL") == split_hash(b"MKVL") == PINNED
    assert split_hash("MKVL") != split_hash("MKVI")
