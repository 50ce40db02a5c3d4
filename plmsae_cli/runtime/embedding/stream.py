"""An embedding under way: what has been sent, what it has taken so far."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

from plmsae_cli.runtime.embedding.figures import Figures
from plmsae_cli.runtime.embedding.transfer import Stopwatch

if TYPE_CHECKING:
    from plmsae_cli.runtime.embedding.embedder import Embedder


class Stream:
    """An embedding whose kernels are queued; some of its rows may still be on their way."""

    def __init__(self, embedder: Embedder, watch: Stopwatch) -> None:
        self.figures = Figures()
        self.budget = 0
        self.compiled = False
        self._embedder, self.watch = embedder, watch
        self._begun, self._waited = time.monotonic(), embedder.transfer.wait_seconds
        self.deliveries: list[Future[None]] = []

    @property
    def kernels(self) -> str:
        """What runs between the attentions: our kernels, torch.compile's, or PyTorch's own."""
        return "fused" if self._embedder.fused else "compiled" if self.compiled else "eager"

    def settle(self) -> None:
        """Wait until all rows sent so far are delivered; raises what a delivery raised."""
        for sent in self.deliveries:
            sent.result()
        self.deliveries.clear()

    def launched(self) -> None:
        self.figures.wait_seconds = self._embedder.transfer.wait_seconds - self._waited

    def wait(self) -> Figures:
        """Wait until every row is delivered."""
        self.settle()
        self.figures.busy_seconds = self.watch.seconds()
        now = time.monotonic()
        # Streams overlap: what is counted for one is not counted for the next.
        self.figures.seconds = now - max(self._begun, self._embedder.last_done)
        self._embedder.last_done = now
        return self.figures
