"""Packs and windows: every document once, every residue once, hardly a token of padding."""

from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plmsae_cli
from plmsae_cli.runtime.embedding.batches import make_batch
from plmsae_cli.runtime.embedding.forecast import typical
from plmsae_cli.runtime.embedding.packing import Typical, choose_shape, deal
from plmsae_cli.runtime.embedding.windows import pieces
from plmsae_cli.store.scan import Scan

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)
PROTEINS = Path(plmsae_cli.__file__).parent / "data" / "proteins.fasta.gz"


def most_central(length: int, window: int) -> list[int]:
    """For each residue the start of its window, by looking at all windows: nearest centre, the earlier of two."""
    if length <= window:
        return [0] * length
    count = 1
    while count < 2 or length - window > (count - 1) * max(1, window // 2):
        count += 1
    starts = [(i * (length - window)) // (count - 1) for i in range(count)]
    owners = []
    for residue in range(length):
        inside = [s for s in starts if s <= residue < s + window]
        owners.append(min(inside, key=lambda s: (abs(residue - (s + (window - 1) / 2)), s)))
    return owners


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 200), st.integers(1, 30))
def test_each_residue_is_from_its_most_central_window(length: int, window: int) -> None:
    owners: list[int] = []
    for piece in pieces([length], window):
        assert 0 <= piece.start <= piece.first < piece.last <= piece.stop <= length
        assert piece.stop - piece.start == min(window, length)
        assert piece.first == len(owners)
        owners += [piece.start] * (piece.last - piece.first)
    assert owners == most_central(length, window)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=20), st.integers(1, 60), st.integers(0, 20))
def test_what_is_foretold_are_the_tokens_of_the_windows(lengths: list[int], window: int, cut: int) -> None:
    ranges = [(start, stop) for start, stop in ((0, cut), (cut, len(lengths))) if start < min(stop, len(lengths))]
    sizes = [[p.stop - p.start + 2 for p in pieces(lengths[start:stop], window)] for start, stop in ranges]
    assert typical(np.array(lengths, np.int32), window, ranges) == Typical(
        max(map(sum, sizes)), max(map(len, sizes)), max(map(max, sizes)), sum(map(sum, sizes))
    )


def test_windows_overlap_by_half_and_leave_context() -> None:
    for length in range(1023, 6000, 97):
        found = pieces([length], 1022)
        for before, after in pairwise(found):
            assert before.stop - after.start >= 511
            assert before.last == after.first
            assert min(before.stop - before.last, after.first - after.start) >= 255
    assert pieces([5, 1022, 3], 1022) == pieces([5, 1022, 3])


@settings(deadline=None, max_examples=200)
@given(LENGTHS, st.integers(1, 200), st.integers(1, 5), st.booleans())
def test_every_document_is_dealt_once_and_fits(lengths: list[int], budget: int, shards: int, constant: bool) -> None:
    sizes = [n + 2 for n in lengths]
    whole = Typical(sum(sizes) * shards, len(sizes) * shards, max(sizes), sum(sizes) * shards)
    shape = choose_shape(whole, 128 * budget, max(sizes)) if constant else None
    packs = deal(sizes, budget, shape)
    assert sorted(i for chosen in (*packs.loose, *packs.constant) for i in chosen) == list(range(len(sizes)))
    for chosen in packs.loose:
        assert len(chosen) == 1 or sum(sizes[i] for i in chosen) <= budget
    for chosen in packs.constant:
        assert shape is not None
        # `make_batch` raises where tokens, documents (padding included) or the longest do not fit.
        batch = make_batch(["M" * n for n in lengths], [pieces(lengths)[i] for i in chosen], shape, False)
        assert len(batch.tokens_T) == len(batch.kept_R) == shape.tokens
        assert len(batch.documents.cu_seqlens) == shape.documents + 1
        assert batch.num_padding <= shape.tokens / 8


@settings(deadline=None, max_examples=50)
@given(LENGTHS, st.integers(1, 20))
def test_a_batch_keeps_the_rows_of_its_pieces(lengths: list[int], window: int) -> None:
    """Number the residues of all proteins: what is kept, in the order of the pieces, is 0, 1, 2, ..."""
    letters = "ACDEFGHIKLMNPQRSTVWY"
    sequences = ["".join(letters[(p + r) % 20] for r in range(n)) for p, n in enumerate(lengths)]
    parts = pieces(lengths, window)
    batch = make_batch(sequences, parts, None, False)
    from plmsae_cli.plm.alphabet import encode

    kept = batch.tokens_T[batch.kept_R]
    assert batch.num_rows == len(kept) == sum(lengths)
    assert kept.tolist() == [token for s in sequences for token in encode(s).tolist()]
    assert batch.num_padding == 0


@pytest.mark.parametrize(("shared", "most"), [(False, 0.01), (True, 0.02)])
@pytest.mark.parametrize("budget", [16_384, 65_536])
def test_hardly_a_token_of_real_packs_is_padding(budget: int, shared: bool, most: float) -> None:
    """Shards of about 200,000 residues, drawn from real lengths, in packs of a shape of their own or of one for all."""
    lengths = [
        min(1022, len(entry.split("\n", 1)[1].replace("\n", "")))
        for entry in gzip.decompress(PROTEINS.read_bytes()).decode().split(">")[1:]
    ]
    lengths_P = np.random.default_rng(0).choice(lengths, 40_000).astype(np.int32)
    none_P = np.zeros(len(lengths_P), bool)
    offsets_P = np.cumsum(lengths_P, dtype=np.int64) - lengths_P
    ranges = Scan("", ~none_P, lengths_P, none_P, none_P, 1022, offsets_P, {}).shard_ranges(200_000)
    whole = typical(lengths_P, 1022, ranges)
    assert whole.tokens == max(int((lengths_P[start:stop] + 2).sum()) for start, stop in ranges)
    computed = real = loose = 0
    for start, stop in ranges:
        sizes = (lengths_P[start:stop] + 2).tolist()
        largest = whole if shared else typical(lengths_P[start:stop], 1022, [[0, stop - start]])
        shape = choose_shape(largest, budget, largest.longest)
        assert shape is not None
        assert shape.documents < 1.4 * shape.tokens / np.mean(lengths_P)
        packs = deal(sizes, budget, shape)
        real += sum(sizes)
        loose += sum(sizes[i] for chosen in packs.loose for i in chosen)
        computed += sum(sizes[i] for chosen in packs.loose for i in chosen) + len(packs.constant) * shape.tokens
    assert 1 - real / computed < most
    assert loose < 0.01 * real, "hardly anything runs uncompiled"
