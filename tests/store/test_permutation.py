"""The bijection is one, is uniform by the published acceptance test, and never changes."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.store.permutation import MAX_ROWS, Permutation, counter_hash, permute, round_keys

NUM_KEYS = 300_000


@pytest.mark.parametrize(
    ("n", "seed", "domain", "places"),
    [
        (6, 0, "", [0, 3, 4, 5, 1, 2]),
        (100, 0, "rows", [33, 1, 21, 69, 76, 5]),
        (10**9, 0, "rows", [175537915, 849698429, 771485636, 570033506, 102881078, 150524820]),
        (10**9, 1, "rows", [580592865, 255886366, 869705911, 181659478, 718747873, 22955091]),
        (10**9, -1, "epoch-1", [429982186, 255244493, 386583562, 959054122, 214461775, 879128965]),
        (2**40 + 5, 0, "rows", [879922120634, 721410549412, 1027687990898, 594299892982, 274254387609]),
    ],
)
def test_golden_values(n: int, seed: int, domain: str, places: list[int]) -> None:
    """Data on disk were placed by these values: a change here makes every shuffled artifact untraceable."""
    assert Permutation(n, seed, domain)(np.arange(len(places))).tolist() == places


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 10_000), seed=st.integers(-(2**63), 2**64), domain=st.sampled_from(["", "rows", "Δ"]))
def test_bijection_by_inversion(n: int, seed: int, domain: str) -> None:
    permutation = Permutation(n, seed, domain)
    index = np.arange(n)
    places = permutation(index)
    assert np.array_equal(np.sort(places), index)
    assert np.array_equal(permutation.inverse(places), index)
    assert np.array_equal(permutation(permutation.inverse(index)), index)


@pytest.mark.parametrize("n", [2**40 - 1, 2**40, 2**40 + 1, 3 * 2**39 + 7, MAX_ROWS])
def test_large_domains(n: int) -> None:
    permutation = Permutation(n, 11)
    edges = np.r_[0:50_000, n - 50_000 : n]
    places = permutation(edges)
    assert places.min() >= 0
    assert places.max() < n
    assert len(np.unique(places)) == len(edges)
    assert np.array_equal(permutation.inverse(places), edges)
    # Mean of 100,000 uniform places: standard deviation n / sqrt(12 * 100,000).
    assert abs(places.astype(np.float64).mean() / n - 0.5) < 3 / math.sqrt(12 * len(edges))


def test_small_cases_and_shapes() -> None:
    assert Permutation(0, 0)(np.arange(0)).tolist() == []
    assert Permutation(1, 0)(np.arange(1)).tolist() == [0]
    assert {tuple(Permutation(2, seed)(np.arange(2))) for seed in range(20)} == {(0, 1), (1, 0)}
    permutation = Permutation(60, 3)
    table_AB = np.arange(60).reshape(10, 6)
    assert np.array_equal(permutation(table_AB.T), permutation(table_AB).T)
    with pytest.raises(ValueError, match="n = -1"):
        Permutation(-1, 0)
    with pytest.raises(ValueError, match="2\\^62"):
        Permutation(MAX_ROWS + 1, 0)


def test_independent_of_chunks() -> None:
    permutation = Permutation(70_001, 5)
    whole = permutation(np.arange(70_001))
    pieces = [permutation(np.arange(a, min(a + 9_973, 70_001))) for a in range(0, 70_001, 9_973)]
    assert np.array_equal(whole, np.concatenate(pieces))


def test_seed_domain_and_n_separate() -> None:
    """Two independent orders of 20,000 rows agree in 1 +- 1 places."""
    index = np.arange(20_000)
    base = Permutation(20_000, 0, "rows")(index)
    for other in (
        Permutation(20_000, 1, "rows"),
        Permutation(20_000, 0, "epoch-1"),
        Permutation(20_001, 0, "rows"),
    ):
        assert (other(index) == base).sum() < 8


@cache
def order_counts(n: int = 6) -> dict[int, np.ndarray]:
    """How often each of the n! orders occurs under NUM_KEYS seeds, by the number of rounds; in the code of `Permutation`."""
    counts = {num_rounds: np.zeros(n**n, dtype=np.int64) for num_rounds in (2, 10, 24)}
    for first in range(0, NUM_KEYS, 10_000):
        keys_SRW = np.stack([round_keys(n, seed, "") for seed in range(first, first + 10_000)])
        keys_RWC = np.repeat(keys_SRW.transpose(1, 2, 0), n, axis=2)
        index = np.tile(np.arange(n, dtype=np.uint64), 10_000)
        for num_rounds, found in counts.items():
            orders = permute(index, keys_RWC[:num_rounds], n).reshape(-1, n).astype(np.int64)
            found += np.bincount(orders @ n ** np.arange(n), minlength=n**n)
    codes = [sum(value * n**i for i, value in enumerate(order)) for order in itertools.permutations(range(n))]
    assert all(found.sum() == found[codes].sum() == NUM_KEYS for found in counts.values())
    return {num_rounds: found[codes] for num_rounds, found in counts.items()}


def chi_square_z(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2).sum() / expected - freedom) / math.sqrt(2 * freedom))


def test_acceptance_all_orders_of_six_rows() -> None:
    assert abs(chi_square_z(order_counts()[24])) < 4


def test_keys_of_the_acceptance_test_are_those_of_the_class() -> None:
    for seed in (0, 1, 299_999):
        keys = round_keys(6, seed, "")[:, :, None]
        assert np.array_equal(permute(np.arange(6, dtype=np.uint64), keys, 6), Permutation(6, seed)(np.arange(6)))


def exact_z(num_rounds: int, num_draws: int) -> float:
    """Expected z of `num_rounds` rounds on 6 = 3 x 2 rows with truly random round functions, by convolution.

    A row is 2 * high + low. An even round adds f(high) to low for a random f: Z_3 -> Z_2, an odd round adds
    g(low) to high for a random g: Z_2 -> Z_3; so a round is one of 8, or 9, permutations with equal chances.
    """
    even = [[2 * (x // 2) + (x + f[x // 2]) % 2 for x in range(6)] for f in itertools.product(range(2), repeat=3)]
    odd = [[2 * ((x // 2 + g[x % 2]) % 3) + x % 2 for x in range(6)] for g in itertools.product(range(3), repeat=2)]
    orders = np.array(list(itertools.permutations(range(6))))
    place = {tuple(order): i for i, order in enumerate(orders.tolist())}
    chances = (orders == np.arange(6)).all(axis=1).astype(float)
    for i in range(num_rounds):
        kernel = even if i % 2 == 0 else odd
        moved = np.zeros(720)
        for step in kernel:
            moved[[place[tuple(order)] for order in np.array(step)[orders].tolist()]] += chances / len(kernel)
        chances = moved
    return float(num_draws * 720 * ((chances - 1 / 720) ** 2).sum() / math.sqrt(2 * 719))


def test_acceptance_can_fail_and_fails_as_predicted() -> None:
    """10 rounds are too few; the excess is the one of ideal round functions, so ours are as good as ideal."""
    predicted = exact_z(10, NUM_KEYS)
    spread = math.sqrt(1 + 2 * predicted * math.sqrt(2 * 719) / 719)
    assert predicted > 200
    assert abs(chi_square_z(order_counts()[10]) - predicted) < 4 * spread
    assert chi_square_z(order_counts()[2]) > 10_000
    assert exact_z(24, NUM_KEYS) < 0.05


def test_no_serial_correlation_and_even_blocks() -> None:
    n, block = 200_000, 1_000
    for seed in (0, 1):
        places = Permutation(n, seed, "rows")(np.arange(n)).astype(np.float64)
        assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 3 / math.sqrt(n)
        # Variance of the mean of `block` draws without replacement from 0..n-1.
        variance = (n * n - 1) / 12 / block * (n - block) / (n - 1)
        squares = ((places.reshape(-1, block).mean(axis=1) - (n - 1) / 2) ** 2 / variance).sum()
        freedom = n // block - 1
        assert abs(squares - freedom) < 3 * math.sqrt(2 * freedom)


def test_counter_hash_golden_values() -> None:
    assert counter_hash(0, np.arange(3)).tolist() == [
        0x48218226FF3CD4BF,
        0x9E0160293A33AAF7,
        0x3DD5EB0403EDDD79,
    ]
    assert counter_hash(7, np.array([-1])).tolist() == [0x69A97E860828CDD5]
    assert int(counter_hash(-1, 2, 3)) == 0xEADBA27E20362828


def test_counter_hash_is_stateless_and_broadcasts() -> None:
    rows, columns = np.arange(50), np.arange(7)
    table_RC = counter_hash(5, rows[:, None], columns)
    assert table_RC.shape == (50, 7)
    assert table_RC[31, 4] == counter_hash(5, 31, 4)
    assert table_RC[3, 4] != table_RC[4, 3]
    assert len(np.unique(table_RC)) == 350
    assert counter_hash(6, 31, 4) != counter_hash(5, 31, 4)


def test_counter_hash_avalanche() -> None:
    """Any input bit of any word, or of the seed, flips each output bit half of the time."""
    num_samples = 4_096
    samples = np.arange(num_samples, dtype=np.uint64)
    base = counter_hash(9, samples, samples + np.uint64(77))
    worst = 0.0
    for bit in range(64):
        flip = np.uint64(1 << bit)
        for other in (
            counter_hash(9, samples ^ flip, samples + np.uint64(77)),
            counter_hash(9, samples, (samples + np.uint64(77)) ^ flip),
            counter_hash(9 ^ (1 << bit), samples, samples + np.uint64(77)),
        ):
            changed = np.unpackbits((base ^ other).view(np.uint8).reshape(-1, 8), axis=1)
            worst = max(worst, float(np.abs(changed.mean(axis=0) - 0.5).max()))
    # 12,288 proportions of 4,096 draws: one beyond 5.5 standard deviations has a chance of 5e-4.
    assert worst < 5.5 * 0.5 / math.sqrt(num_samples)
