"""Which latents have not fired for long."""

from __future__ import annotations

import torch
from torch import Tensor

from plmsae_cli.sae.interface import Reduce, one_process

LONGEST_WINDOW = 10_000_000


def dead_window(total_tokens: int) -> int:
    """Global tokens without firing after which a latent counts as dead: min(10 M, a tenth of the run)."""
    return max(1, min(LONGEST_WINDOW, total_tokens // 10))


class DeadLatents:
    """Global tokens since each latent last fired: the same on every rank, at every world size.

    Never waits for a GPU.
    """

    tokens_since_fired_N: Tensor
    """int64, the state to save and restore; counted from the first step for a latent that never fired."""

    def __init__(self, num_latents: int, device: torch.device | str = "cpu") -> None:
        self.tokens_since_fired_N = torch.zeros(num_latents, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, fired_N: Tensor, global_rows: int, reduce: Reduce = one_process) -> None:
        """Count a step of `global_rows` tokens, on this rank's share of which the latents in `fired_N` (bool) fired.

        `reduce` gets int32 [N].
        """
        self.tokens_since_fired_N.add_(global_rows).masked_fill_(reduce(fired_N.int()) > 0, 0)

    def mask(self, window: int) -> Tensor:
        """bool [N]: has not fired in the last `window` global tokens."""
        return self.tokens_since_fired_N >= window
