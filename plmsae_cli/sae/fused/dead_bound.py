"""How many latents are dead, known on the host without asking the device.

A latent dead now was already nearly dead some steps ago, and that count has long arrived.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plmsae_cli.sae.ranks import Ranks

LONGEST_LAG = 16
"""Most steps between counts of the nearly dead."""
SMALLEST = 256


class DeadBound:
    """An upper bound of the number of dead latents that the host knows without waiting for the device.

    The nearly dead are counted every `lag` steps; a count is used from `lag` to 2 `lag` steps after it was taken, the
    first at once. It is a function of the ages alone, and `state` continues it exactly.
    """

    def __init__(self, ages_N: Tensor, window: int, tokens_a_step: int, spread: Ranks | None = None) -> None:
        """`spread`: the ranks that hold as many other latents each; the bound then is of the one with most dead."""
        self._ages_N, self._spread = ages_N, spread
        self.lag = min(LONGEST_LAG, max(1, window // tokens_a_step // 8))
        self._nearly = window - 2 * self.lag * tokens_a_step
        self._window = window
        self._bound: int | None = None
        self._pending: tuple[Tensor, torch.cuda.Event | None] | None = None

    def places(self, step: int) -> int:
        """Places for the dead of `step`: 0, or a size that few steps outgrow. Called for every step, in order."""
        bound = self._next_bound(step)
        if bound == 0:
            return 0
        size = SMALLEST
        while size < bound:
            size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
        return min(size, -(-len(self._ages_N) // 16) * 16)

    def state(self) -> list[int]:
        """The bound in use, the one that follows, and of how many latents; waits for the device."""
        return [] if self._bound is None else [self._bound, self._arrived(), len(self._ages_N)]

    def load(self, state: list[int]) -> None:
        """Continue from `state`, taken with the ages that hold now; if spread otherwise, from a new count."""
        if state and state[2:] in ([], [len(self._ages_N)]):
            self._bound, pending = state[:2]
            self._pending = (torch.tensor(pending), None)

    def _next_bound(self, step: int) -> int:
        if self._nearly <= 0:  # in a run of a few steps everything is nearly dead: wait for the true number
            return int(self._agreed((self._ages_N >= self._window).sum()))
        if self._bound is None:
            self._pending = self._count()
            self._bound = self._arrived()
        elif step % self.lag == 0:
            self._bound = self._arrived()
            self._pending = self._count()
        return self._bound

    def _count(self) -> tuple[Tensor, torch.cuda.Event | None]:
        count = self._agreed((self._ages_N >= self._nearly).sum(dtype=torch.int32))
        if not count.is_cuda:
            return count, None
        host = torch.empty((), dtype=torch.int32, pin_memory=True)
        host.copy_(count, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return host, event

    def _agreed(self, count: Tensor) -> Tensor:
        return count if self._spread is None else self._spread.maximum(count)

    def _arrived(self) -> int:
        assert self._pending is not None
        count, event = self._pending
        if event is not None:
            event.synchronize()
        return int(count)
