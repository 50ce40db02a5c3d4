"""Documents into packs of constant size, in an order that is a function of (seed, epoch).

An epoch's documents are permuted, then packed greedily: a pack takes documents until the next one does not fit. No document is
put into two packs. Pack g of the run is the same for any number of ranks; the only state is the integer step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from plmsae_cli.plm.alphabet import Packed, pack
from plmsae_cli.store.permutation import Permutation
from plmsae_cli.store.tokens import Documents, TokenStream

SHORTEST = 32
"""Mean tokens a document that a pack has room for: a pack of T tokens lists at most T / 32 documents."""
_SPARE_DOCUMENTS = 64


class Packs:
    """The documents of token shards, those longer than `max_len` cut to their first residues."""

    def __init__(
        self,
        shards: Sequence[npt.NDArray[np.uint8]],
        pack_tokens: int,
        max_len: int,
        seed: int | None,
        documents: Documents | None = None,
        room: int | None = None,
    ) -> None:
        """`max_len` counts `<cls>` and `<eos>`; `seed` None keeps the documents in their own order: validation. `documents` are
        those to take, by default all; `room`, most of them in a pack: by default what these want, but another number is
        another compilation, so validation has that of the packs trained on."""
        assert 2 < max_len <= pack_tokens
        self._stream = TokenStream(shards)
        self._pack_tokens, self._max_len, self._seed = pack_tokens, max_len, seed
        self._first_P, residues_P = documents or self._stream.documents()
        self._length_P = np.minimum(residues_P + 2, max_len)
        self.num_cut = int((residues_P + 2 > max_len).sum())
        # Attention's kernels look at every place in the list, filled or not: room for the usual number and a quarter, in powers
        # of two, since another number of places is another compilation.
        usual = pack_tokens / max(1.0, float(self._length_P.mean())) if len(self._length_P) else 0.0
        wanted = int(1.25 * usual) + _SPARE_DOCUMENTS
        self.room = room or min(max(1, pack_tokens // SHORTEST), 1 << (wanted - 1).bit_length())
        self._epochs: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
        self._first: list[int] = [0]

    @property
    def num_documents(self) -> int:
        return len(self._length_P)

    @property
    def num_tokens(self) -> int:
        return int(self._length_P.sum())

    @property
    def mean_context(self) -> float:
        """Length of a token's document, mean over tokens: what it attends to."""
        return float((self._length_P**2).sum() / self._length_P.sum())

    def epoch_packs(self, epoch: int) -> int:
        """Packs in this epoch; the greedy filling makes it vary a little."""
        self._prepare(epoch)
        return len(self._epochs[epoch][1]) - 1

    def _prepare(self, epoch: int) -> None:
        while len(self._epochs) <= epoch:
            number = len(self._epochs)
            index = np.arange(self.num_documents, dtype=np.int64)
            if self._seed is not None:
                index = Permutation(self.num_documents, self._seed, domain=f"documents-{number}").inverse(index)
            # Past epochs are never asked for again in a run that goes forward; keep the boundaries, drop the order.
            if number >= 2:
                self._epochs[number - 2] = (np.empty(0, dtype=np.int64), self._epochs[number - 2][1])
            self._epochs.append((index, _boundaries(self._length_P[index], self._pack_tokens, self.room)))
            self._first.append(self._first[-1] + len(self._epochs[-1][1]) - 1)

    def pack(self, number: int) -> Packed:
        """Pack `number` of the run, counted through the epochs."""
        epoch = 0
        while True:
            self._prepare(epoch)
            if number < self._first[epoch + 1]:
                break
            epoch += 1
        order_P, bounds = self._epochs[epoch]
        assert len(order_P), f"pack {number} is of an epoch whose order was dropped"
        at = number - self._first[epoch]
        documents = [self._document(int(i)) for i in order_P[bounds[at] : bounds[at + 1]]]
        # Room for the padding's own documents, which max_len cuts.
        slots = self.room + self._pack_tokens // self._max_len + 1
        return pack(documents, num_tokens=self._pack_tokens, num_documents=slots, max_len=self._max_len)

    def _document(self, index: int) -> npt.NDArray[np.uint8]:
        """Residues of one document, without its `<cls>` and `<eos>`."""
        return self._stream.read(int(self._first_P[index]), int(self._length_P[index]) - 2)


def _boundaries(length_P: npt.NDArray[np.int64], pack_tokens: int, num_documents: int) -> npt.NDArray[np.int64]:
    """First document of each pack, and the number of documents at the end."""
    ends_P = np.cumsum(length_P)
    bounds = [0]
    while bounds[-1] < len(length_P):
        first = bounds[-1]
        used = int(ends_P[first - 1]) if first else 0
        fitting = int(np.searchsorted(ends_P, used + pack_tokens, side="right"))
        bounds.append(min(fitting, first + num_documents))
    return np.array(bounds, dtype=np.int64)
