"""Token shards: the format byte for byte, the round trip, the documents, every fault."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.store.fs import MissingError, Store, StoreError
from plmsae_cli.store.tokens import document_offsets, read_tokens, write_tokens

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
    offsets = document_offsets(tokens)
    assert [tokens[a:b].tolist() for a, b in pairwise(offsets)] == [d.tolist() for d in documents]
    assert offsets[-1] == len(body)


def test_documents_cut_between_shards() -> None:
    assert document_offsets(np.array([5, 6, 2, 0, 7, 2, 0, 8], np.uint8)).tolist() == [0, 3, 6, 8]
    assert document_offsets(np.array([5, 6], np.uint8)).tolist() == [0, 2]
    assert document_offsets(np.array([], np.uint8)).tolist() == [0]


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
