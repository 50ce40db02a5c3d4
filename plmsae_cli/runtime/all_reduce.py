"""An all-reduce over this machine's ranks, timed: `torchrun -m plmsae_cli.runtime.all_reduce BYTES`, for `plmsae doctor`.

The first rank prints the bytes a second that a ring moves past each rank: 2 (W - 1) / W x bytes / time.
"""

from __future__ import annotations

import sys
import time

import torch

from plmsae_cli.runtime.device import pick_device
from plmsae_cli.runtime.dist import gang

REPEATS = 5


def main() -> None:
    """One rank. Raises AssertionError where the sum is wrong."""
    with gang() as ranks:
        values = torch.ones(int(sys.argv[1]) // 4, device=pick_device(ranks.local_rank))
        ranks.sum(values)
        assert values[0].item() == values[-1].item() == ranks.world, "the sum over ranks is wrong"
        begun = time.perf_counter()
        for _ in range(REPEATS):
            ranks.sum(values)
        values[0].item()  # waits for the device
        seconds = (time.perf_counter() - begun) / REPEATS
        if ranks.first:
            moved = 2 * (ranks.world - 1) / ranks.world * 4 * values.numel()
            print(f"all-reduce: {moved / seconds:.0f}", flush=True)


if __name__ == "__main__":
    main()
