"""A small dataset that streams read, and a stream of no dataset."""

from __future__ import annotations

import pytest
import torch

from plmsae_cli.store.blocks import chunk_name, write_chunk, write_index
from plmsae_cli.store.fs import Store, join

SIZES = [24, 24, 24, 24, 5]


class RandomRows:
    """A stream of random batches, each a function of its step."""

    wait_seconds = 0.0

    def __init__(self, batch: int, d: int) -> None:
        self.blocks = self
        self.quantiser = None
        self.batch, self.d = batch, d

    def rows(self, step: int) -> torch.Tensor:
        return torch.randn(self.batch, self.d, generator=torch.Generator().manual_seed(step))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """101 rows in 5 chunks; row i holds (i, -i)."""
    folder = str(tmp_path_factory.mktemp("stream"))
    index = torch.arange(sum(SIZES), dtype=torch.float32)
    names = [chunk_name(i) for i in range(len(SIZES))]
    for name, rows_RD in zip(names, torch.stack([index, -index], dim=1).split(SIZES), strict=True):
        write_chunk(Store(), join(folder, name), rows_RD)
    write_index(Store(), folder, names, SIZES, 2, torch.float32)
    return folder
