"""How well a batch is mixed: a figure that would show rows of neighbouring proteins coming together."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np

from plmsae_cli.store.permutation import Permutation

SEGMENTS = 64


class BatchEntropy:
    """Entropy of where a batch's rows come from, 1 where they come from everywhere.

    The rows before the shuffle are cut into G = min(64, N) segments of equal length (neighbouring proteins of the FASTA);
    with n_g rows of the batch from segment g, H = -sum_g n_g/B ln(n_g/B) / ln G. A batch of one segment has 0. B uniform
    draws have, to first order, 1 - (G - 1) / (2 B ln G) (Miller 1955): .9991 for 8192 rows.

    It needs no row's content: row r of the training numbering was put at place pi(r), so the places of a batch tell its rows.
    Computed beside the training, one asked-for step ahead.

    Args:
        num_rows: N, rows of the dataset.
        seed: of its shuffle.
        batch_rows: B, the global batch.
        block_of: the block that a step reads.
    """

    def __init__(self, num_rows: int, seed: int, batch_rows: int, block_of: Callable[[int], int]) -> None:
        self._order = Permutation(num_rows, seed, domain="shuffle")
        self._batch_rows, self._block_of = batch_rows, block_of
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="entropy")
        self._ahead: tuple[int, Future[float]] | None = None
        self._last: tuple[int, float] | None = None

    def __call__(self, step: int) -> float:
        """H of the batch of `step`; asked at even distances, it has been computed before."""
        if self._last is not None and self._last[0] == step:
            return self._last[1]
        before = self._last[0] if self._last is not None else None
        if self._ahead is not None and self._ahead[0] == step:
            found = self._ahead[1].result()
        else:
            found = self._entropy(self._block_of(step))
        self._last = step, found
        if before is not None and step > before:
            coming = 2 * step - before
            self._ahead = coming, self._thread.submit(self._entropy, self._block_of(coming))
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _entropy(self, block: int) -> float:
        first = block * self._batch_rows
        rows_B = self._order.inverse(np.arange(first, first + self._batch_rows, dtype=np.int64))
        return entropy(rows_B, self._order.n)


def entropy(rows_B: np.ndarray[tuple[int, ...], np.dtype[np.int64]], num_rows: int) -> float:
    """H of rows of a numbering of `num_rows`; see `BatchEntropy`."""
    segments = min(SEGMENTS, num_rows)
    if segments == 1:
        return 1.0
    counts_G = np.bincount((rows_B.astype(np.float64) * segments / num_rows).astype(np.int64), minlength=segments)
    shares = counts_G[counts_G > 0] / rows_B.size
    return round(float(-(shares * np.log(shares)).sum() / math.log(segments)), 4)
