"""Ranks: a gang of one looks like a gang of many."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from plmsae_cli.runtime.device import pick_device


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
def gang(timeout_s: float = 600.0) -> Iterator[Gang]:
    """Join the gang that the environment describes; a gang of one needs no process group."""
    if not in_gang():
        yield Gang()
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = pick_device(local_rank).type == "cuda"
    if cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=timeout_s))
    try:
        yield Gang(dist.get_rank(), dist.get_world_size(), local_rank)
    finally:
        dist.destroy_process_group()
