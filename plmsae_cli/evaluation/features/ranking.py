"""The first entries of very many lists at once: each latent's strongest residues, and random ones of each band.

A list's entries are ordered by a 32-bit key, then by row. Where lists hold one entry an owner (a protein, a cluster), that is the
owner's first. What is left of a list is the same however rows were split into batches and pieces, as long as pieces are joined in
the order of rows. Letters: P pairs (row, latent) of a batch, C entries, L lists of a latent, S = N L lists in all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KEY_BITS = 32
_KEY_MASK = (1 << KEY_BITS) - 1
_LARGEST = 0x7F800000  # bits of infinity: those of activations, which are positive, are below and ordered as they are
_BUFFER = 1 << 21


class Entries(NamedTuple):
    """Entries of lists, in their order."""

    place_C: Tensor
    """int64: number of the list << 32 | key."""
    row_C: Tensor
    """int64."""
    owner_C: Tensor
    """int64, below 2^32."""

    @property
    def list_C(self) -> Tensor:
        return self.place_C >> KEY_BITS

    def cpu(self) -> Entries:
        return Entries(*(column.cpu() for column in self))


def joined(parts: list[Entries]) -> Entries:
    """One after the other."""
    return Entries(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def strength_key(acts_P: Tensor) -> Tensor:
    """Key that puts the largest of these positive float32 numbers first, int64 [P]."""
    return _LARGEST - acts_P.view(torch.int32).long()


def strength_of_key(place_C: Tensor) -> Tensor:
    """The activation of entries that were ordered by `strength_key`, float32."""
    return (_LARGEST - (place_C & _KEY_MASK)).int().view(torch.float32)


def first_entries(entries: Entries, widths_L: Tensor, distinct: bool) -> Entries:
    """The first `widths_L[list % L]` entries of each list, in order; with `distinct` one an owner.

    Of entries with the same list and key those come first that are given first: give them in the order of rows.
    """
    place_C, order_C = entries.place_C.sort(stable=True)
    if distinct and len(place_C):
        owner_C = entries.owner_C.index_select(0, order_C)
        # Time of a sort goes by the bits of the largest number.
        mark_C, by_owner_C = ((place_C >> KEY_BITS) * (owner_C.amax() + 1) + owner_C).sort(stable=True)
        first_C = torch.empty_like(order_C, dtype=torch.bool)
        first_C[by_owner_C] = _starts(mark_C)
        kept_C = first_C.nonzero().squeeze(1)
        place_C, order_C = place_C.index_select(0, kept_C), order_C.index_select(0, kept_C)
    list_C = place_C >> KEY_BITS
    kept_C = (rank_in_run(list_C) < width_of(list_C, widths_L)).nonzero().squeeze(1)
    # Columns are large and their order is random: what is dropped is not fetched.
    order_C = order_C.index_select(0, kept_C)
    rows = (column.index_select(0, order_C) for column in (entries.row_C, entries.owner_C))
    return Entries(place_C.index_select(0, kept_C), *rows)


def rank_in_run(value_C: Tensor) -> Tensor:
    """How many equal values stand before each one, which are neighbours."""
    index_C = torch.arange(len(value_C), device=value_C.device)
    start_C = torch.where(_starts(value_C), index_C, 0)
    return index_C - (start_C.cummax(0).values if len(start_C) else start_C)


def width_of(list_C: Tensor, widths_L: Tensor) -> Tensor:
    """How many entries each of these lists holds when it is full."""
    return widths_L.index_select(0, list_C % len(widths_L))


def _starts(value_C: Tensor) -> Tensor:
    """Where a run of equal neighbours begins."""
    start_C = torch.ones_like(value_C, dtype=torch.bool)
    start_C[1:] = value_C[1:] != value_C[:-1]
    return start_C


class Lists:
    """S lists filled a batch at a time; rows must ascend from batch to batch.

    An entry beyond the last of a full list is dropped at sight, so time is linear in the pairs offered, and memory that of
    the full lists: eight times 24 bytes an entry while they are sorted with as many that wait.
    """

    def __init__(self, num_lists: int, widths_L: Tensor, distinct: bool) -> None:
        device = widths_L.device
        self._widths_L = widths_L
        self._distinct = distinct
        self._limit_S = torch.full((num_lists,), _KEY_MASK + 1, dtype=torch.int64, device=device)
        empty = torch.empty(0, dtype=torch.int64, device=device)
        self._kept = Entries(empty, empty, empty)
        self._waiting: list[Entries] = []
        self._count = 0

    def offer(self, list_P: Tensor, key_P: Tensor, which_P: Tensor, row_B: Tensor, owner_B: Tensor) -> None:
        """Entries of a batch, in the order of rows; pair p is of row `row_B[which_P[p]]` and its owner."""
        # An equal key has a larger row than the one that is there.
        good_G = (key_P < self._limit_S.index_select(0, list_P)).nonzero().squeeze(1)
        list_G, key_G, which_G = (column.index_select(0, good_G) for column in (list_P, key_P, which_P))
        rows = (column.index_select(0, which_G) for column in (row_B, owner_B))
        self._waiting.append(Entries(list_G << KEY_BITS | key_G, *rows))
        self._count += len(good_G)
        if self._count > max(_BUFFER, len(self._kept.row_C)):
            self._settle()

    def _settle(self) -> None:
        self._kept = first_entries(joined([self._kept, *self._waiting]), self._widths_L, self._distinct)
        self._waiting, self._count = [], 0
        list_C = self._kept.list_C
        last_C = (rank_in_run(list_C) == width_of(list_C, self._widths_L) - 1).nonzero().squeeze(1)
        self._limit_S[list_C.index_select(0, last_C)] = self._kept.place_C.index_select(0, last_C) & _KEY_MASK

    def entries(self) -> Entries:
        """What the lists hold, list after list."""
        self._settle()
        return self._kept


def pair_hash(seed: int, row_B: Tensor, which_P: Tensor, latent_P: Tensor) -> Tensor:
    """The upper 32 bits of `counter_hash(seed, row, latent)` for pairs of rows `row_B[which_P]` and latents, int64 [P]."""
    state_B = _mix(_mix(torch.tensor(_signed(seed + _GOLDEN), device=row_B.device)) ^ row_B)
    return (_mix(state_B.index_select(0, which_P) ^ latent_P) >> 32) & _KEY_MASK


def _signed(word: int) -> int:
    word %= 1 << 64
    return word - (1 << 64) if word >= 1 << 63 else word


_GOLDEN = 0x9E3779B97F4A7C15
_MIX_A, _MIX_B = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on the bits of int64, as `store/permutation.py` has it for numpy; products wrap."""
    for shift, factor in ((30, _MIX_A), (27, _MIX_B)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))
