"""Ranks: a gang of one looks like a gang of many."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from plmsae_cli.runtime.device import pick_device

# Older releases of torch have other names for the two.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


PATIENCE = "PLMSAE_PATIENCE"


class _Done:
    """What nobody needs to wait for."""

    def wait(self) -> None: ...


@dataclass(frozen=True)
class Gang:
    """This process's place among those that train together."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; the identity for a gang of one."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_later(self, tensor: torch.Tensor) -> Any:
        """`sum` beside what follows, until the result's `wait`; see `sae.ranks.Ranks`."""
        return _Done() if self.world == 1 else dist.all_reduce(tensor, async_op=True)

    def sum_rows_later(self, full: torch.Tensor, own: torch.Tensor) -> Any:
        """`own`, this rank's part of the sum of `full` over ranks; as `sum_later`."""
        if self.world == 1:
            own.copy_(full)
            return _Done()
        return _reduce_scatter(own, full, async_op=True)

    def gather_rows_later(self, own: torch.Tensor, full: torch.Tensor) -> Any:
        """`full`, every rank's `own` in order; as `sum_later`."""
        if self.world == 1:
            full.copy_(own)
            return _Done()
        return _all_gather(full, own, async_op=True)

    def maximum(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def sum_gradients(self, parameters: Iterator[torch.nn.Parameter]) -> None:
        """Sum the gradients over ranks as one flat message: the loss is already divided by the global batch."""
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def in_gang() -> bool:
    """Started by torchrun or srun with several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def gang() -> Iterator[Gang]:
    """Join the gang that the environment describes; a gang of one needs no process group.

    A collective that a rank is waited for in fails after `$PLMSAE_PATIENCE` seconds, 600 unless set.
    """
    if not in_gang():
        yield Gang()
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = pick_device(local_rank)
    cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=float(os.environ.get(PATIENCE, "600")))
    )
    try:
        yield Gang(dist.get_rank(), dist.get_world_size(), local_rank)
    finally:
        dist.destroy_process_group()
