"""Which documents go into which pack, so that hardly a token is padding and compiled shapes stay the same.

Constant packs have one shape, that of a shard or of a whole artifact; a loose pack is exactly as long as its
documents. All lengths are in tokens, `<cls>` and `<eos>` included.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

SPECIAL_TOKENS = 2  # <cls> and <eos>
_GRAIN = 128
"""A constant pack's tokens are a multiple of this: whole tiles of the matrix products."""
_SLACK = 1 + 1 / 512
"""Room that packs are given beyond their share: documents are not dealt out to the token."""
_LEAST_FILL = 7 / 8
"""A pack filled less runs loose: uncompiled, it is faster than that much padding."""


class Typical(NamedTuple):
    """The largest shard of an artifact, which decides a shape for all, and the artifact as a whole."""

    tokens: int
    documents: int
    longest: int
    """Tokens of the artifact's longest document."""
    all_tokens: float
    """Of the artifact: whether compiling pays."""


class Shape(NamedTuple):
    """The constant shape of packs."""

    tokens: int
    documents: int
    """Entries of `cu_seqlens`, less one: documents, those of padding and empty ones included."""
    max_len: int

    @property
    def room(self) -> int:
        """Documents beside those of padding."""
        return self.documents - _padding_documents(self.tokens, self.max_len)


class Packs(NamedTuple):
    loose: list[list[int]]
    """Indices of documents, longest first: those that fit no constant pack, and what is left over."""
    constant: list[list[int]]


def choose_shape(typical: Typical, budget: int, longest: int) -> Shape | None:
    """The largest shape within `budget` tokens that the largest shard fills without a remainder.

    Every empty document costs the attention kernel a look, so there are hardly more places than documents. None where
    not even one document fits.
    """
    largest = typical.tokens * _SLACK
    count = max(1, math.ceil(largest / (budget // _GRAIN * _GRAIN or 1)))
    tokens = math.ceil(largest / count / _GRAIN) * _GRAIN
    max_len = min(longest, tokens)
    if tokens > budget or max_len <= SPECIAL_TOKENS:
        return None
    room = math.ceil(1.1 * typical.documents / count) + 8
    return Shape(tokens, room + _padding_documents(tokens, max_len), max_len)


def _padding_documents(tokens: int, max_len: int) -> int:
    return math.ceil((1 - _LEAST_FILL) * tokens / max_len)


def deal(lengths: Sequence[int], budget: int, shape: Shape | None) -> Packs:
    """Every document to one pack.

    Constant packs get the longest document left, each time the emptiest one: they end up with nearly the same number
    of tokens and of documents. What finds no room is packed loosely, longest first, up to `budget`.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if shape is None:
        return Packs(_loose(order, lengths, budget), [])
    left = [i for i in order if lengths[i] > shape.max_len]
    fitting = order[len(left) :]
    filled = sum(lengths[i] for i in fitting) / shape.tokens
    count = math.ceil(filled) if filled >= math.ceil(filled) * _LEAST_FILL else int(filled)
    packs: list[list[int]] = [[] for _ in range(count)]
    used = [0] * count
    emptiest = [(0, number) for number in range(count)]
    for i in fitting:
        if not emptiest or emptiest[0][0] + lengths[i] > shape.tokens:
            left.append(i)
            continue
        number = emptiest[0][1]
        packs[number].append(i)
        used[number] += lengths[i]
        if len(packs[number]) < shape.room:
            heapq.heapreplace(emptiest, (used[number], number))
        else:
            heapq.heappop(emptiest)
    constant = []
    for number, chosen in enumerate(packs):
        if used[number] >= _LEAST_FILL * shape.tokens:
            constant.append(chosen)
        else:
            left += chosen
    left.sort(key=lambda i: (-lengths[i], i))
    return Packs(_loose(left, lengths, budget), constant)


def _loose(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Neighbours in order of length together: equal lengths share an attention call where documents are looped over."""
    packs: list[list[int]] = []
    used = budget
    for i in order:
        if used + lengths[i] > budget or not packs:
            packs.append([])
            used = 0
        packs[-1].append(i)
        used += lengths[i]
    return packs
