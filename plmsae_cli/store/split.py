"""Which proteins are held out of training: a function of their sequences alone.

The same function serves embedding and language-model training, so a protein held out of one is, at the same
share, held out of the other, whatever file it comes from and wherever it stands in it. P: proteins.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

MIN_HELDOUT = 32
"""Proteins held out of a small set, where `holdout` alone would leave too few to measure anything."""
_SEED = 0x706C6D736165
_HASHES = 2**64


def split_hash(sequence: str | bytes) -> int:
    """A 64-bit hash (xxh3, fixed seed) of an upper-case sequence: the whole of it, as it is in the file."""
    letters = sequence.encode() if isinstance(sequence, str) else sequence
    return xxhash.xxh3_64_intdigest(letters, seed=_SEED)


def heldout(hashes_P: npt.NDArray[np.uint64], holdout: float) -> npt.NDArray[np.bool_]:
    """Which proteins are held out, from the `split_hash` of each: those with the smallest hashes.

    These are the hashes below `holdout` of their range, at least the 32 smallest, at most half of all (half
    wins); none if `holdout` is 0. Equal sequences are on the same side, and a larger share only adds.
    """
    wanted = 0
    chosen_P: npt.NDArray[np.bool_] = np.zeros(len(hashes_P), bool)
    if holdout > 0:
        chosen_P = hashes_P < np.uint64(min(int(holdout * _HASHES), _HASHES - 1))
        wanted = min(max(int(chosen_P.sum()), MIN_HELDOUT), len(hashes_P) // 2)
    if wanted == 0:
        return np.zeros(len(hashes_P), bool)
    if int(chosen_P.sum()) == wanted:
        return chosen_P  # of millions of proteins the usual case, and the one that needs no copy
    last = np.partition(hashes_P, wanted - 1)[wanted - 1]
    chosen_P = hashes_P <= last
    if 2 * int(chosen_P.sum()) > len(hashes_P):
        chosen_P = hashes_P < last
    return chosen_P
