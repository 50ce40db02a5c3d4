"""Token shards of protein language models: the `.bin` files of Synthyra's SpeedrunningPLMs.

Format, little-endian: a header of 256 int32 (magic 20240520, version 1, number of tokens, zeros), then one
byte a token. Documents follow one another, each `<cls>` residues `<eos>` in ESM's alphabet of 33 tokens; a set of
shards is one stream, in which a document may go on from one file to the next.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from plmsae_cli.store.fs import FileRecord, Store, StoreError, each

MAGIC = 20240520
VERSION = 1
CLS = 0
EOS = 2
NUM_TOKENS = 33

_HEADER = np.dtype("<i4")
_HEADER_BYTES = 256 * _HEADER.itemsize
_MOST_TOKENS = 2**31 - 1
_HINT = "a shard is 256 int32 (20240520, 1, number of tokens, zeros) and then one byte a token"

Tokens = npt.NDArray[np.uint8]


def write_tokens(store: Store, path: str, documents: Iterable[Tokens]) -> FileRecord:
    """Write one shard, held in memory until all documents are there: its header counts them.

    Each document is whole: `<cls>`, at least nothing, `<eos>`. Raises ValueError for one that is not, and for
    more tokens than the header can count.
    """
    pieces: list[Tokens] = []
    num_tokens = 0
    for number, document in enumerate(documents):
        inner = document[1:-1]
        if len(document) < 2 or document[0] != CLS or document[-1] != EOS or np.isin((CLS, EOS), inner).any():
            raise ValueError(f"document {number} for {path} is not <cls> residues <eos>: {document[:8].tolist()}")
        pieces.append(np.ascontiguousarray(document, dtype=np.uint8))
        num_tokens += len(document)
    if num_tokens > _MOST_TOKENS:
        raise ValueError(f"{num_tokens:,} tokens are too many for {path}: write several shards")
    header = np.zeros(256, _HEADER)
    header[:3] = MAGIC, VERSION, num_tokens
    return store.write(path, [header.data, *(piece.data for piece in pieces)], size=_HEADER_BYTES + num_tokens)


def count_tokens(store: Store, path: str) -> int:
    """Tokens of a shard, by its header. A header or a length that is not the format's is a StoreError saying which."""
    size = store.size(path)
    if size < _HEADER_BYTES:
        raise StoreError(f"{path} has {size} bytes, less than the header of a token shard", _HINT)
    magic, version, num_tokens = (int(n) for n in np.frombuffer(store.read(path, 0, 12), _HEADER))
    if magic != MAGIC:
        raise StoreError(f"{path} is not a token shard: its magic number is {magic}, not {MAGIC}", _HINT)
    if version != VERSION:
        raise StoreError(f"{path} is a token shard of version {version}; this reads version {VERSION}", _HINT)
    if size != _HEADER_BYTES + num_tokens:
        raise StoreError(
            f"{path} should have {num_tokens:,} tokens of one byte, but {size - _HEADER_BYTES:,} bytes follow"
            " its header: it is cut short, or its tokens are wider",
            _HINT,
        )
    return num_tokens


def open_tokens(store: Store, path: str) -> Tokens:
    """The tokens of a shard, mapped from the file and not read; from S3, of a copy in the cache. Raises as `count_tokens`."""
    num_tokens = count_tokens(store, path)
    if num_tokens == 0:
        return np.empty(0, np.uint8)
    return np.memmap(store.local(path), np.uint8, "r", offset=_HEADER_BYTES, shape=(num_tokens,))


def check_alphabet(tokens: Tokens, path: str) -> None:
    """Raise a StoreError for a token that is not one of ESM's 33."""
    if len(tokens) and tokens.max() >= NUM_TOKENS:
        first = int(np.argmax(tokens >= NUM_TOKENS))
        raise StoreError(f"{path}: token {first:,} is {tokens[first]}, ESM's alphabet ends at {NUM_TOKENS - 1}", _HINT)


def read_tokens(store: Store, path: str) -> Tokens:
    """`open_tokens`, with every token checked."""
    tokens = open_tokens(store, path)
    check_alphabet(tokens, path)
    return tokens


def is_bin(files: str | Sequence[str]) -> bool:
    """Whether what a user names are token shards, by their ending."""
    return not isinstance(files, str) or files.endswith(".bin")


def find_shards(store: Store, wanted: str | Sequence[str]) -> list[str]:
    """The shards that paths or globs name (`*`, `?`, `[...]` in the last part), local or s3://: of each in the order of names.

    Raises:
        StoreError: a path or a glob that names no file, a file that is named twice.
    """
    found: list[str] = []
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        folder, _, name = pattern.rpartition("/")
        if any(letter in name for letter in "*?["):
            names = sorted(n for n in store.list(folder or ".") if "/" not in n and fnmatch.fnmatchcase(n, name))
            matches = [f"{folder}/{n}" if folder else n for n in names]
        else:
            matches = [pattern] if store.exists(pattern) else []
        if not matches:
            raise StoreError(f"no token shard matches {pattern}", "name .bin files, or a glob such as data/train_*.bin")
        found += matches
    if twice := {path for path in found if found.count(path) > 1}:
        raise StoreError(f"{min(twice)} is named twice", "name each shard once")
    return found


_SAMPLES = 4
_SAMPLE_BYTES = 4096


def shards_digest(store: Store, paths: Sequence[str]) -> str:
    """What stands for the content of shards in a key: their numbers of tokens, and 4 samples of 4 KiB of each.

    Whole hashes would read 10 GB, or fetch them, before a first look at the plan.
    """

    def facts(path: str) -> bytes:
        num_tokens = count_tokens(store, path)
        length = min(_SAMPLE_BYTES, num_tokens)
        starts = [(num_tokens - length) * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
        return b"%d;" % num_tokens + b"".join(store.read(path, _HEADER_BYTES + start, length) for start in starts)

    state = hashlib.sha256()
    for body in each(paths[0], facts, paths):
        state.update(hashlib.sha256(body).digest())
    return state.hexdigest()


class Documents(NamedTuple):
    """Where documents are in a stream of tokens, ends not counted; P documents."""

    first_P: npt.NDArray[np.int64]
    """Place of the first residue."""
    length_P: npt.NDArray[np.int64]
    """Residues."""

    def some(self, keep_P: npt.NDArray[np.bool_]) -> Documents:
        return Documents(self.first_P[keep_P], self.length_P[keep_P])


class TokenStream:
    """Shards as one stream of tokens."""

    def __init__(self, shards: Sequence[Tokens]) -> None:
        self.shards = shards
        self._start_S = np.cumsum([0, *(len(shard) for shard in shards)])

    def __len__(self) -> int:
        return int(self._start_S[-1])

    def read(self, start: int, length: int) -> Tokens:
        """Tokens [length] from a place on, across the ends of shards."""
        number = int(np.searchsorted(self._start_S, start, side="right")) - 1
        at = start - int(self._start_S[number])
        piece = self.shards[number][at : at + length]
        if len(piece) == length:
            return piece
        return np.concatenate([piece, self.read(start + len(piece), length - len(piece))])

    def documents(self) -> Documents:
        """Those with residues. One begins at each `<cls>` and behind each `<eos>`.

        So what other writers cut at the end of a shard is one document again, and the rest of a document whose beginning is
        in a shard that is not here is a document of its own.
        """
        starts: list[npt.NDArray[np.int64]] = []
        before = EOS
        for base, shard in zip(self._start_S, self.shards, strict=False):
            if not len(shard):
                continue
            begins_T = shard == CLS
            begins_T[1:] |= shard[:-1] == EOS
            begins_T[0] |= before == EOS
            starts.append(np.flatnonzero(begins_T).astype(np.int64) + base)
            before = int(shard[-1])
        start_P = np.concatenate([np.empty(0, np.int64), *starts])
        stop_P = np.concatenate([start_P[1:], [len(self)]]) if len(start_P) else start_P
        first_P = start_P + (self._at(start_P) == CLS)
        length_P = stop_P - (self._at(stop_P - 1) == EOS) - first_P
        return Documents(first_P, length_P).some(length_P > 0)

    def _at(self, place_P: npt.NDArray[np.int64]) -> Tokens:
        """The tokens at ascending places."""
        cut_S = np.searchsorted(place_P, self._start_S)
        parts = [
            shard[place_P[first:last] - base]
            for shard, base, (first, last) in zip(self.shards, self._start_S, pairwise(cut_S), strict=False)
        ]
        return np.concatenate([np.empty(0, np.uint8), *parts])
