"""The remembered index: right at first, instant after, anew when the file changes."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.config.errors import UserError
from plmsae_cli.store import fasta_index as module
from plmsae_cli.store.fasta_index import fasta_index, fasta_sha256
from plmsae_cli.store.split import split_hash


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLMSAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, once for each pass."""
    seen: list[Path] = []
    real = module.entries

    def counted(path: Path, *rest: object) -> object:
        seen.append(path)
        return real(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "entries", counted)
    return seen


@settings(deadline=None, max_examples=60)
@given(
    proteins=st.lists(
        st.tuples(st.sampled_from("abcdefghij"), st.text("ACDLAGVXUBZO.-J*17", max_size=30)),
        min_size=1,
        max_size=15,
    )
)
def test_against_the_obvious(tmp_path_factory: pytest.TempPathFactory, proteins: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.mktemp("index") / "a.fasta"
    path.write_text("".join(f">{i} x\n{s}\n" for i, s in proteins))
    index = fasta_index(path)
    sequences = [s for _, s in proteins]
    names = [i for i, _ in proteins]
    assert index.lengths_R.tolist() == [len(s) for s in sequences]
    assert index.unknown_R.tolist() == [sum(Counter(s)[letter] for letter in "J*17") for s in sequences]
    assert index.hashes_R.tolist() == [split_hash(s) for s in sequences]
    assert index.repeats_R.tolist() == [name in names[:i] for i, name in enumerate(names)]
    assert index.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_hash_is_of_the_stored_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.fasta.gz"
    path.write_bytes(gzip.compress(b">a\nMK\n"))
    assert fasta_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_second_time_nothing_is_read(tmp_path: Path, passes: list[Path]) -> None:
    path = tmp_path / "a.fasta"
    path.write_text(">a\nMK\n>b\nACD\n")
    (tmp_path / "link.fasta").symlink_to(path)
    first = fasta_index(path)
    assert len(passes) == 1
    second = fasta_index(tmp_path / "link.fasta")
    assert fasta_sha256(path) == first.sha256
    assert len(passes) == 1
    for name in ("lengths_R", "unknown_R", "hashes_R", "repeats_R"):
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


def test_a_changed_file_is_read_again(tmp_path: Path, passes: list[Path]) -> None:
    path = tmp_path / "a.fasta"
    path.write_text(">a\nMK\n")
    before = path.stat()
    old = fasta_index(path)
    path.write_text(">a\nMV\n")  # of the same size
    assert fasta_index(path).sha256 != old.sha256
    path.write_text(">a\nMA\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # and, as `cp -p` leaves it, of the same age
    assert fasta_index(path).sha256 == hashlib.sha256(b">a\nMA\n").hexdigest()
    assert len(passes) == 3


@pytest.mark.parametrize("damage", [b"", b"no archive", b"PK\x03\x04"])
def test_a_damaged_memory_is_made_anew(tmp_path: Path, cache: Path, passes: list[Path], damage: bytes) -> None:
    path = tmp_path / "a.fasta"
    path.write_text(">a\nMK\n")
    fasta_index(path)
    (remembered,) = (cache / "fasta").iterdir()
    remembered.write_bytes(damage)
    assert fasta_index(path).lengths_R.tolist() == [2]
    assert len(passes) == 2
    fasta_index(path)
    assert len(passes) == 2


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[Path]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLMSAE_CACHE", str(tmp_path / "file"))
    path = tmp_path / "a.fasta"
    path.write_text(">a\nMK\n")
    assert fasta_index(path).lengths_R.tolist() == fasta_index(path).lengths_R.tolist() == [2]
    assert len(passes) == 2


def test_faults_are_not_remembered(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.fasta.gz"
    path.write_bytes(gzip.compress(b">a\nMK\n" * 100)[:-4])
    for _ in range(2):
        with pytest.raises(UserError, match="cut short"):
            fasta_index(path)
    assert not cache.exists()
    with pytest.raises(UserError, match="no such file"):
        fasta_sha256(tmp_path / "nowhere.fasta")


def test_file_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    path = tmp_path / "a.fasta"
    path.write_text(">a\nMK\n")
    real = module._build

    def build_and_append(path: Path) -> object:
        index = real(path)
        path.write_text(">a\nMK\n>b\nMK\n")
        return index

    monkeypatch.setattr(module, "_build", build_and_append)
    with pytest.raises(UserError, match="changed while it was read"):
        fasta_index(path)
    assert not cache.exists()


def test_equal_hashes_of_unequal_ids_are_no_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xxhash, "xxh3_64_intdigest", lambda data, seed=0: len(data))
    path = tmp_path / "a.fasta"
    path.write_text("".join(f">{name}\nMK\n" for name in ("a", "b", "a", "cc", "b")))
    assert fasta_index(path).repeats_R.tolist() == [False, False, True, False, True]
