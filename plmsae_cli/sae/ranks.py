"""What a dictionary that is spread over ranks asks of them; every rank calls the same things in the same order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> Any:
        """Makes what the current stream gets from now on wait for it; on a CPU, waits."""


class Ranks(Protocol):
    """Processes that train together. Tensors handed to `*_later` stay as they are until `wait`."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""

    def maximum(self, tensor: Tensor) -> Tensor:
        """Largest over ranks, in place."""

    def sum_later(self, tensor: Tensor) -> Pending:
        """`sum`, beside what follows."""

    def sum_rows_later(self, full: Tensor, own: Tensor) -> Pending:
        """Sum `full` over ranks, of which this rank gets its part in `own`: one of `world` equal parts, in order."""

    def gather_rows_later(self, own: Tensor, full: Tensor) -> Pending:
        """Every rank's `own` in `full`, in order of rank; `own` may be this rank's part of `full`."""


@dataclass(frozen=True)
class Rows:
    """The latents whose state a rank holds: equal parts, the last ones shorter or empty where the number does not split."""

    num_latents: int
    rank: int
    world: int

    @property
    def padded(self) -> int:
        """Places a rank, the same on all."""
        return -(-self.num_latents // self.world)

    @property
    def places(self) -> slice:
        """This rank's places among those of all ranks, padding included."""
        return slice(self.rank * self.padded, (self.rank + 1) * self.padded)

    @property
    def first(self) -> int:
        return min(self.rank * self.padded, self.num_latents)

    @property
    def num(self) -> int:
        return min(self.first + self.padded, self.num_latents) - self.first

    @property
    def latents(self) -> slice:
        """Which latents they are."""
        return slice(self.first, self.first + self.num)
