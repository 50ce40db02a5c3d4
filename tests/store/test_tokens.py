"""Token shards: the format byte for byte, the round trip, the documents, every fault."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.store.fs import MissingError, Store, StoreError
from plmsae_cli.store.tokens import TokenStream, find_shards, open_tokens, read_tokens, shards_digest, write_tokens

RESIDUES = st.lists(st.integers(3, 32), max_size=20)


def document(residues: list[int]) -> np.ndarray:
    return np.array([0, *residues, 2], np.uint8)


def shard(body: bytes, num_tokens: int | None = None, magic: int = 20240520, version: int = 1) -> bytes:
    """The file as the format's description has it."""
    return struct.pack("<256i", magic, version, len(body) if num_tokens is None else num_tokens, *[0] * 253) + body


@settings(deadline=None, max_examples=80)
@given(proteins=st.lists(RESIDUES, max_size=12))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, proteins: list[list[int]]) -> None:
    path = tmp_path_factory.mktemp("tokens") / "train-00000.bin"
    documents = [document(p) for p in proteins]
    record = write_tokens(Store(), str(path), iter(documents))
    body = b"".join(bytes([0, *p, 2]) for p in proteins)
    assert path.read_bytes() == shard(body)
    assert record.size == 1024 + len(body)
    tokens = read_tokens(Store(), str(path))
    assert tokens.dtype == np.uint8
    assert tokens.tobytes() == body
    assert residues([tokens]) == [p for p in proteins if p]


def residues(shards: list[np.ndarray]) -> list[list[int]]:
    """The residues of every document that has any."""
    stream = TokenStream(shards)
    return [stream.read(int(a), int(n)).tolist() for a, n in zip(*stream.documents(), strict=True)]


@settings(deadline=None, max_examples=80)
@given(st.lists(RESIDUES.filter(bool), min_size=1, max_size=8), st.lists(st.integers(0, 100), max_size=4))
def test_documents_cut_between_shards_are_whole(proteins: list[list[int]], cuts: list[int]) -> None:
    """Wherever other writers end a shard, even inside several in one document, the documents are the same."""
    whole = np.concatenate([document(p) for p in proteins])
    assert residues(np.split(whole, sorted(min(cut, len(whole)) for cut in cuts))) == proteins


def test_documents_without_their_beginning_or_end() -> None:
    def shards(*tokens: list[int]) -> list[np.ndarray]:
        return [np.array(t, np.uint8) for t in tokens]

    assert residues(shards([5, 6, 2, 0, 7, 2, 0, 8])) == [[5, 6], [7], [8]]
    # The shard between them is not here: what follows a whole document is not its continuation.
    assert residues(shards([0, 7, 2], [5, 6, 2, 0, 8, 2])) == [[7], [5, 6], [8]]
    assert residues(shards([5, 6, 2, 7, 2])) == [[5, 6], [7]]
    assert residues(shards([2, 0, 2, 0], [])) == []
    assert residues([]) == []


def test_shards_are_mapped_and_not_read(tmp_path: Path) -> None:
    """A sparse file of 2 GB: its tokens can be looked at without memory for them."""
    path = tmp_path / "large.bin"
    path.write_bytes(shard(b"", 2**31 - 1))
    with path.open("r+b") as file:
        file.truncate(1024 + 2**31 - 1)
    tracemalloc.start()
    tokens = open_tokens(Store(), str(path))
    assert tokens[2**31 - 2] == 0
    assert shards_digest(Store(), [str(path)])
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_shards_by_globs_and_what_stands_for_them(tmp_path: Path) -> None:
    for name, body in (("t_2.bin", b"\0\5\2"), ("t_1.bin", b"\0\6\2"), ("v_1.bin", b"\0\7\2"), ("t_1.txt", b"")):
        (tmp_path / name).write_bytes(shard(body))
    store, here = Store(), str(tmp_path)
    both = [f"{here}/t_1.bin", f"{here}/t_2.bin"]
    assert find_shards(store, f"{here}/t_*.bin") == both
    assert find_shards(store, [f"{here}/v_1.bin", f"{here}/t_?.bin"]) == [f"{here}/v_1.bin", *both]
    with pytest.raises(StoreError, match=r"no token shard matches .*/w_\*\.bin"):
        find_shards(store, f"{here}/w_*.bin")
    with pytest.raises(StoreError, match="named twice"):
        find_shards(store, [f"{here}/t_1.bin", f"{here}/t_*.bin"])
    marks = {shards_digest(store, paths) for paths in (both, both[::-1], both[:1])}
    assert len(marks) == 3
    (tmp_path / "moved.bin").write_bytes((tmp_path / "t_1.bin").read_bytes())
    assert shards_digest(store, [f"{here}/moved.bin"]) == shards_digest(store, both[:1])


FAULTS = {
    "short": (b"\0" * 1023, "has 1023 bytes, less than the header"),
    "magic": (shard(b"\0\2", magic=20240521), "its magic number is 20240521, not 20240520"),
    "version": (shard(b"\0\2", version=2), "is a token shard of version 2"),
    "cut": (shard(b"\0\5\2")[:-1], "should have 3 tokens of one byte, but 2 bytes follow"),
    "two bytes a token": (shard(b"\0\0\5\0\2\0", 3), "should have 3 tokens of one byte, but 6 bytes follow"),
    "negative": (shard(b"\0\2", -2), "should have -2 tokens"),
    "vocabulary": (shard(b"\0\5\41\2"), "token 2 is 33, ESM's alphabet ends at 32"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(tmp_path: Path, fault: str) -> None:
    data, message = FAULTS[fault]
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    with pytest.raises(StoreError, match=message) as caught:
        read_tokens(Store(), str(path))
    assert str(path) in caught.value.message


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        read_tokens(Store(), str(tmp_path / "a.bin"))


@pytest.mark.parametrize("tokens", [[], [0], [5, 2], [0, 5], [0, 5, 2, 0, 6, 2], [0, 0, 2]])
def test_documents_must_be_whole(tmp_path: Path, tokens: list[int]) -> None:
    with pytest.raises(ValueError, match=r"document 1 for .* is not <cls> residues <eos>"):
        write_tokens(Store(), str(tmp_path / "a.bin"), [document([5]), np.array(tokens, np.uint8)])
    assert Store().list(str(tmp_path)) == {}
