"""Packs as tensors, made ahead of the device in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from plmsae_cli.plm.alphabet import encode, pack
from plmsae_cli.plm.attention import Documents
from plmsae_cli.runtime.embedding.packing import Shape
from plmsae_cli.runtime.embedding.windows import Piece

_AHEAD = 2
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Batch:
    """One pass of the model."""

    pieces: tuple[Piece, ...]
    """Its documents, in order."""
    tokens_T: torch.Tensor
    documents: Documents
    kept_R: torch.Tensor
    """Places of the tokens whose rows are stored, in the order of the pieces; constant packs repeat place 0 up to T, so
    that all shapes are constant."""
    num_rows: int
    """Of them, those that are stored."""
    num_padding: int
    """Tokens of padding."""
    constant: bool

    def to(self, device: torch.device) -> tuple[torch.Tensor, Documents, torch.Tensor]:
        """Tokens, documents and kept places there; from pinned memory without waiting."""
        tokens_T, cu_seqlens, kept_R = (
            t.to(device, non_blocking=True) for t in (self.tokens_T, self.documents.cu_seqlens, self.kept_R)
        )
        return tokens_T, self.documents._replace(cu_seqlens=cu_seqlens), kept_R


def make_batch(sequences: Sequence[str], pieces: Sequence[Piece], shape: Shape | None, pin: bool) -> Batch:
    """The pack of these pieces of `sequences`, of constant shape if one is given, in pinned memory if asked."""
    encoded = [encode(sequences[p.protein][p.start : p.stop]) for p in pieces]
    if shape is None:
        packed = pack(encoded)
    else:
        packed = pack(encoded, num_tokens=shape.tokens, num_documents=shape.documents, max_len=shape.max_len)
    starts = np.cumsum([1] + [len(tokens) + 2 for tokens in encoded])  # of each document's first residue
    kept = [np.arange(p.first - p.start, p.last - p.start) + at for p, at in zip(pieces, starts, strict=False)]
    rows = np.concatenate(kept)
    num_rows, num_tokens = len(rows), len(packed.tokens_T)
    if shape is not None:
        rows = np.concatenate([rows, np.zeros(num_tokens - num_rows, rows.dtype)])
    tensors = (packed.tokens_T, packed.cu_seqlens, torch.from_numpy(rows))
    tokens_T, cu_seqlens, kept_R = (t.pin_memory() for t in tensors) if pin else tensors
    documents = Documents(cu_seqlens, packed.max_len, packed.lengths)
    padding = num_tokens - int(starts[-1]) + 1
    return Batch(tuple(pieces), tokens_T, documents, kept_R, num_rows, padding, shape is not None)


def ahead(make: Callable[[_Item], _Made], items: Iterable[_Item]) -> Iterator[_Made]:
    """`map(make, items)`, two of them made in a thread while the consumer works."""
    with ThreadPoolExecutor(1, thread_name_prefix="packs") as thread:
        pending: deque[Future[_Made]] = deque()
        for item in items:
            pending.append(thread.submit(make, item))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
