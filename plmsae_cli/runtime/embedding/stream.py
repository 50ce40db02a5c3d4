"""An embedding under way: what has been sent, what it has taken so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

import torch

from plmsae_cli.runtime.embedding.delivery import Put
from plmsae_cli.runtime.embedding.figures import Figures
from plmsae_cli.runtime.embedding.transfer import Stopwatch

if TYPE_CHECKING:
    from plmsae_cli.runtime.embedding.embedder import Embedder


class Job(NamedTuple):
    """What is asked of an embedding, as `Embedder.stream` takes it."""

    sequences: Sequence[str]
    layers: Sequence[int]
    """Ascending, each once."""
    stored: torch.dtype
    batch_tokens: str | int
    put: Put
    progress: Callable[..., None]
    check_stop: Callable[[], None]
    num_residues: int


class Stream:
    """An embedding whose kernels are queued; some of its rows may still be on their way."""

    def __init__(self, embedder: Embedder, watch: Stopwatch, job: Job) -> None:
        self.job = job
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

    def advanced(self, residues: int, tokens: int, padding: int) -> None:
        """Count a pass and show how far it is."""
        self.figures.passes += 1
        self.figures.residues += residues
        self.figures.tokens += tokens
        self.figures.pad_tokens += padding
        self.job.progress(self.figures.residues, self.job.num_residues, unit="residues")

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
