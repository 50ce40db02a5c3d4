"""Token shards of protein language models: the `.bin` files of Synthyra's SpeedrunningPLMs.

Format, little-endian: a header of 256 int32 (magic 20240520, version 1, number of tokens, zeros), then one
byte a token. Documents follow one another, each `<cls>` residues `<eos>` in ESM's alphabet of 33 tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from plmsae_cli.store.fs import FileRecord, Store, StoreError

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


def read_tokens(store: Store, path: str) -> Tokens:
    """All tokens of a shard. A header or a length that is not the format's is a StoreError saying which."""
    size = store.size(path)
    if size < _HEADER_BYTES:
        raise StoreError(f"{path} has {size} bytes, less than the header of a token shard", _HINT)
    magic, version, num_tokens = np.frombuffer(store.read(path, 0, 12), _HEADER).tolist()
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
    tokens = np.empty(num_tokens, np.uint8)
    store.read_into(path, _HEADER_BYTES, tokens.data)
    if num_tokens and tokens.max() >= NUM_TOKENS:
        first = int(np.argmax(tokens >= NUM_TOKENS))
        raise StoreError(f"{path}: token {first:,} is {tokens[first]}, ESM's alphabet ends at {NUM_TOKENS - 1}", _HINT)
    return tokens


def document_offsets(tokens: Tokens) -> npt.NDArray[np.int64]:
    """Where documents begin, then the number of tokens: document i is tokens[offsets[i] : offsets[i + 1]].

    A document begins at each `<cls>`. What stands before the first, the rest of a document that other
    writers split between shards, counts as a document too.
    """
    starts = np.flatnonzero(tokens == CLS).astype(np.int64)
    if len(tokens) and (len(starts) == 0 or starts[0] != 0):
        starts = np.concatenate(([0], starts))
    return np.concatenate((starts, [len(tokens)])).astype(np.int64)
