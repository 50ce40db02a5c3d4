"""Policies, numbering and shard ranges against their definitions; real proteins."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plmsae_cli
from plmsae_cli.config.data import Embed
from plmsae_cli.config.errors import UserError
from plmsae_cli.runtime.embedding import forecast
from plmsae_cli.store import scan as scans
from plmsae_cli.store.fasta_index import FastaIndex
from plmsae_cli.store.proteins import Scan, as_embedded, kept_proteins, scan, split_hash

SHARED = Path(plmsae_cli.__file__).parents[2] / "shared" / "data" / "uniprot_20k.fasta.gz"
SHIPPED = Path(plmsae_cli.__file__).parent / "data"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLMSAE_CACHE", str(tmp_path / "cache"))


@dataclass(frozen=True)
class Options:
    max_length: int = 1022
    long: str = "truncate"
    unknown: str = "X"
    duplicates: str = "error"
    empty: str = "error"
    holdout: float = 0.01


def write(path: Path, proteins: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f">{i}\n{s}\n" for i, s in proteins))
    return path


RECORDS = st.lists(
    st.tuples(st.sampled_from([f"p{i}" for i in range(30)]), st.text("ACDJ*X", max_size=12)),
    min_size=1,
    max_size=40,
)
TOLERANT = st.builds(
    Options,
    max_length=st.integers(1, 14),
    long=st.sampled_from(["truncate", "skip"]),
    unknown=st.sampled_from(["X", "skip"]),
    duplicates=st.just("first"),
    empty=st.just("skip"),
    holdout=st.sampled_from([0.0, 0.01, 0.2]),
)


@settings(deadline=None, max_examples=120)
@given(proteins=RECORDS, options=TOLERANT)
def test_policies_and_numbering_by_a_loop(
    tmp_path_factory: pytest.TempPathFactory, proteins: list[tuple[str, str]], options: Options
) -> None:
    path = write(tmp_path_factory.mktemp("scan") / "a.fasta", proteins)
    counts = dict.fromkeys(("skipped_empty", "duplicates", "skipped_unknown", "skipped_long"), 0)
    expected: list[tuple[str, str, str]] = []
    seen: set[str] = set()
    for name, sequence in proteins:
        repeated = name in seen
        seen.add(name)
        if not sequence:
            counts["skipped_empty"] += 1
        elif repeated:
            counts["duplicates"] += 1
        elif options.unknown == "skip" and set(sequence) & {"J", "*"}:
            counts["skipped_unknown"] += 1
        elif options.long == "skip" and len(sequence) > options.max_length:
            counts["skipped_long"] += 1
        else:
            embedded = sequence[: options.max_length].replace("J", "X").replace("*", "X")
            expected.append((name, sequence, embedded))
    if not expected:
        with pytest.raises(UserError, match=f"none of {len(proteins)} proteins is left"):
            scan(path, options)
        return
    found = scan(path, options)
    kept = list(kept_proteins(path, found, options))
    assert [(p.id, p.length, p.sequence) for p in kept] == [(i, len(s), e) for i, s, e in expected]
    assert found.lengths_P.tolist() == [len(e) for *_, e in expected]
    assert found.truncated_P.tolist() == [len(s) > len(e) for _, s, e in expected]
    assert found.counts == {
        "proteins": len(proteins),
        "kept": len(expected),
        "truncated": sum(len(s) > len(e) for _, s, e in expected),
        "unknown_letters": sum(s.count("J") + s.count("*") for _, s, _ in expected),
        "residues": sum(len(e) for *_, e in expected),
        **counts,
    }
    check_numbering(found)
    sides: dict[str, bool] = {}
    for (_, sequence, _), held in zip(expected, found.heldout_P, strict=True):
        assert sides.setdefault(sequence, bool(held)) == held
    assert 2 * found.heldout_P.sum() <= found.num_proteins
    assert options.holdout > 0 or not found.heldout_P.any()


def check_numbering(found: Scan) -> None:
    """Each side is numbered 0..N-1 in FASTA order, without gaps."""
    next_row = {False: 0, True: 0}
    before = []
    for length, held, offset in zip(found.lengths_P, found.heldout_P, found.row_offset_P, strict=True):
        before.append((next_row[False], next_row[True]))
        assert offset == next_row[bool(held)]
        next_row[bool(held)] += int(length)
    before.append((next_row[False], next_row[True]))
    assert (found.num_rows, found.num_heldout_rows) == before[-1]
    assert found.rows_before(range(found.num_proteins + 1)) == before


LENGTHY = "M" * 1023
ERRORS = [
    (
        [("a", "MK"), ("b", ""), ("c", "")],
        Options(),
        " line 3: protein b has no residues (and 1 more)",
        "empty: skip",
    ),
    (
        [("a", "MK"), ("b", "MK"), ("a", "MV")],
        Options(),
        " line 5: the id a was used before, on line 1",
        "duplicates: first",
    ),
    (
        [("a", "MK"), ("b", "MJ*K")],
        Options(unknown="error"),
        " line 3: protein b has letters outside the alphabet: * J",
        "unknown: X",
    ),
    (
        [("a", "MK"), ("b", LENGTHY)],
        Options(long="error"),
        " line 3: protein b has 1,023 residues, max_length is 1,022",
        "long: truncate",
    ),
    ([("a", LENGTHY)], Options(long="skip"), ": none of 1 proteins is left (long 1)", "relax"),
    (
        [("a", ""), ("b", "J")],
        Options(empty="skip", unknown="skip"),
        ": none of 2 proteins is left (empty 1, unknown 1)",
        "relax",
    ),
]


@pytest.mark.parametrize(("proteins", "options", "message", "hint"), ERRORS)
def test_errors(tmp_path: Path, proteins: list[tuple[str, str]], options: Options, message: str, hint: str) -> None:
    path = write(tmp_path / "a.fasta", proteins)
    with pytest.raises(UserError) as caught:
        scan(path, options)
    assert caught.value.message == f"{path}{message}"
    assert hint in str(caught.value.hint)


def test_all_problems_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fasta", [("a", "MK"), ("b", ""), ("a", "MV"), ("c", "MJ"), ("d", "MKVLA")])
    with pytest.raises(UserError) as caught:
        scan(path, Options(max_length=4, long="error", unknown="error"))
    lines = caught.value.message.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path} line {n}" for n in (3, 5, 7, 9)]
    assert str(caught.value.hint).count(";") == 3


def test_options_of_the_embed_section_and_the_index_shared_between_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fasta", [(f"p{i}", "MKVL" * (i + 1)) for i in range(100)])
    wide = scan(path, Embed(fasta=str(path), layers=[1]))
    narrow = scan(path, Embed(fasta=str(path), layers=[1], max_length=40, long="skip", holdout=0.3))
    assert wide.sha256 == narrow.sha256
    assert wide.heldout_P.sum() == 32
    assert narrow.counts["kept"] == 10
    # Truncation does not move a protein to the other side.
    cut = scan(path, Embed(fasta=str(path), layers=[1], max_length=7))
    assert np.array_equal(cut.heldout_P, wide.heldout_P)


def scan_of(lengths: np.ndarray) -> Scan:
    none_P = np.zeros(len(lengths), bool)
    offsets = np.cumsum(lengths) - lengths
    return Scan("", ~none_P, lengths.astype(np.int32), none_P, none_P, int(lengths.max()), offsets.astype(np.int64), {})


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 3000) | st.integers(1, 40_000), min_size=1, max_size=80),
    rows_per_shard=st.integers(1, 50_000),
)
def test_shard_ranges_cover_each_protein_once_at_near_equal_cost(lengths: list[int], rows_per_shard: int) -> None:
    ranges = scan_of(np.array(lengths)).shard_ranges(rows_per_shard)
    assert [protein for start, stop in ranges for protein in range(start, stop)] == list(range(len(lengths)))
    assert all(start < stop for start, stop in ranges)
    wanted = -(-sum(lengths) // rows_per_shard)
    assert len(ranges) <= wanted
    costs = [length + length**2 / 4096 for length in lengths]
    mean = sum(costs) / wanted
    for start, stop in ranges:
        assert sum(costs[start:stop]) <= mean + max(costs) + 1e-6
        if len(ranges) == wanted:
            assert sum(costs[start:stop]) >= mean - max(costs) - 1e-6


def test_shards_of_usual_proteins_are_near_equal() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.7, 0.7, 50_000), 30, 1022).astype(np.int64)
    ranges = scan_of(lengths).shard_ranges(100_000)
    assert len(ranges) == -(-lengths.sum() // 100_000)
    costs = np.array([(lengths[a:b] + lengths[a:b] ** 2 / 4096).sum() for a, b in ranges])
    assert np.abs(costs / costs.mean() - 1).max() < 0.015
    rows = np.array([lengths[a:b].sum() for a, b in ranges])
    assert rows.max() < 1.25 * 100_000


def test_ranges_of_many_proteins_are_exact_integers() -> None:
    """Two million proteins, near 2^53 in cost: still a cover, and balanced."""
    lengths = np.full(2_000_000, 46_000)
    ranges = scan_of(lengths).shard_ranges(46_000_000)
    assert len(ranges) == 2000
    assert {stop - start for start, stop in ranges} == {1000}


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=80),
    rows_per_shard=st.integers(1, 50_000),
    piece=st.integers(1, 30),
    seed=st.integers(0, 100),
)
def test_pieces_of_any_size_give_the_same_plan(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], rows_per_shard: int, piece: int, seed: int
) -> None:
    hashes_R = np.random.default_rng(seed).integers(0, 2**64, len(lengths), np.uint64)
    unknown_R, repeats_R = np.zeros(len(lengths), np.int32), np.zeros(len(lengths), bool)
    index = FastaIndex("", np.array(lengths, np.int32), unknown_R, hashes_R, repeats_R)

    def plan(size: int) -> list[Any]:
        for module in (scans, forecast):
            monkeypatch.setattr(module, "_PIECE", size)
        found = scans._number(index, ~repeats_R, {"long": 0, "unknown": 0, "duplicates": 0, "empty": 0}, Options(900))
        ranges = found.shard_ranges(rows_per_shard)
        typical = forecast.typical(found.lengths_P, 500, ranges)
        return [found.row_offset_P.tolist(), ranges, found.rows_before([a for a, _ in ranges]), typical]

    assert plan(piece) == plan(1000)


def test_a_plan_holds_few_bytes_a_protein() -> None:
    count, random_ = 1_000_000, np.random.default_rng(0)
    lengths_R, nothing_R = random_.integers(1, 2000, count).astype(np.int32), np.zeros(count, np.int32)
    index = FastaIndex("", lengths_R, nothing_R, random_.integers(0, 2**64, count, np.uint64), nothing_R.astype(bool))
    kept_R = np.ones(count, bool)
    tracemalloc.start()
    found = scans._number(index, kept_R, {"long": 0, "unknown": 0, "duplicates": 0, "empty": 0}, Options())
    ranges = found.shard_ranges(1_000_000)
    forecast.typical(found.lengths_P, 1022, ranges)
    found.rows_before([start for start, _ in ranges])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * count


def test_changed_file_under_an_old_scan(tmp_path: Path) -> None:
    path = write(tmp_path / "a.fasta", [("a", "MKV"), ("b", "MK")])
    options = Options()
    found = scan(path, options)
    for other in ([("a", "MKV")], [("a", "MKV"), ("b", "MKL")], [("a", "MKV"), ("b", "MK"), ("c", "M")]):
        with pytest.raises(UserError, match="changed since it was scanned"):
            list(kept_proteins(write(path, other), found, options))


def test_as_embedded() -> None:
    every = "".join(map(chr, range(33, 97))) + "{|}~"
    assert as_embedded(every, 1000) == "".join(c if c in "LAGVSERTIDPKQNFYMHWCXBUZO.-" else "X" for c in every)
    assert as_embedded("MKVL", 3) == "MKV"


def test_numbering_in_closed_form(tmp_path: Path) -> None:
    """Proteins of one length: first rows are its multiples, on each side of the split."""
    rng = random.Random(0)
    proteins = [(f"p{i}", "".join(rng.choices("ACDEF", k=8))) for i in range(100_000)]
    found = scan(write(tmp_path / "a.fasta", proteins), Options())
    assert found.heldout_P.mean() == pytest.approx(0.01, rel=0.2)
    for side_P in (found.heldout_P, ~found.heldout_P):
        assert np.array_equal(found.row_offset_P[side_P], 8 * np.arange(side_P.sum()))


@pytest.mark.parametrize(
    ("name", "proteins", "residues", "longest"),
    [("proteins.fasta.gz", 1200, 263_143, 400), ("smoke.fasta.gz", 80, 5222, 89)],
)
def test_shipped_proteins(name: str, proteins: int, residues: int, longest: int) -> None:
    found = scan(SHIPPED / name, Options(unknown="error", long="error", holdout=0.1))
    assert found.num_proteins == proteins
    assert found.counts["residues"] == residues
    assert found.lengths_P.min() >= 30
    assert found.lengths_P.max() == longest
    assert 32 <= found.heldout_P.sum() < 0.15 * 1200
    # The licence file states what ships.
    text = (SHIPPED / "LICENSES.md").read_text()
    assert f"{residues:,}" in text
    assert f"{(SHIPPED / name).stat().st_size:,}" in text
    assert (SHIPPED / name).read_bytes()[4:8] == bytes(4)  # no time stamp


@pytest.mark.skipif(not SHARED.exists(), reason="needs shared/data/uniprot_20k.fasta.gz")
def test_twenty_thousand_real_proteins() -> None:
    found = scan(SHARED, Options(max_length=10_000, holdout=0.01))
    assert found.counts["proteins"] == found.counts["kept"] == 20_000
    assert found.counts["residues"] == found.num_rows + found.num_heldout_rows == 9_055_569
    assert found.lengths_P.max() == 8081
    assert np.median(found.lengths_P) == 345
    assert found.heldout_P.mean() == pytest.approx(0.01, abs=4 * np.sqrt(0.01 * 0.99 / 20_000))
    limit = 0.01 * 2**64
    for protein, held in zip(kept_proteins(SHARED, found, Options(max_length=10_000)), found.heldout_P, strict=True):
        assert (split_hash(protein.sequence) < limit) == held
