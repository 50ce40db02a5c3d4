"""`train.loader: litdata`: LitData's own StreamingDataset and StreamingDataLoader in place of our stream.

The files are the same. On one rank the steps of the first epoch are those of `BlockStream`, to the bit. What differs:
several ranks read a part of the dataset each (rank r the r-th run of consecutive blocks of B / W rows), not a share of each
block; every epoch has the same order; a resumed run reads its way to its step; nothing is read ahead.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.blocks import Blocks
from plmsae_cli.store.fs import is_remote
from plmsae_cli.training.stream import Stream, steps_per_epoch


class LitDataStream(Stream):
    """Batches of a local dataset through litdata, for one rank.

    Args:
        blocks: the dataset, for its shape.
        chunk_rows: rows of every chunk but the last.
        batch_rows: B, the GLOBAL batch.

    Raises:
        UserError: litdata is not installed, would drop rows, would give all ranks the same rows, or cannot read the folder.
    """

    def __init__(
        self,
        blocks: Blocks,
        chunk_rows: int,
        batch_rows: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        try:
            from litdata import StreamingDataLoader, StreamingDataset
            from litdata.streaming.item_loader import TokensLoader
        except ModuleNotFoundError as error:
            raise UserError(
                "train.loader: litdata needs the package litdata", 'pip install "plmsae[litdata]"'
            ) from error

        self.steps_per_epoch = steps_per_epoch(blocks.num_rows, batch_rows, world)
        self.blocks, self.wait_seconds = blocks, 0.0
        self._device, self._share_rows = torch.device(device), batch_rows // world
        if is_remote(blocks.folder):
            raise UserError(f"train.loader: litdata reads local folders, not {blocks.folder}", "use loader: blocks")
        if chunk_rows % self._share_rows and blocks.num_rows > chunk_rows:
            raise UserError(
                f"litdata drops what is left of each chunk: {chunk_rows} rows are not a multiple of the {self._share_rows} rows"
                f" that a rank reads (train.batch_tokens {batch_rows} on {world} rank(s))",
                "choose a batch that divides optimize.block_rows, or use loader: blocks",
            )
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if world > 1 and not (distributed and torch.distributed.get_world_size() == world):
            raise UserError(
                f"litdata asks torch.distributed for its part of the data, which has not been started with {world} ranks",
                "start the process group first: before it, every rank reads the same rows",
            )
        dataset = StreamingDataset(
            blocks.folder,
            item_loader=TokensLoader(block_size=self._share_rows * blocks.width),
            shuffle=False,
            drop_last=True,
        )
        # One item is a rank's whole batch. Worker processes would take ten times as long (they send rows through a pipe).
        self._loader: Any = StreamingDataLoader(dataset, batch_size=1, num_workers=0, shuffle=False, drop_last=True)
        self._batches: Iterator[torch.Tensor] | None = None
        self._newest: tuple[int, torch.Tensor] | None = None

    def rows(self, step: int) -> torch.Tensor:
        """This rank's rows [B / W, width] of `step`, on the device; asking for the newest again reads nothing."""
        if self._newest is not None and self._newest[0] == step:
            return self._newest[1]
        begin = time.perf_counter()
        following = self._newest is not None and step == self._newest[0] + 1 and step % self.steps_per_epoch
        if self._batches is None or not following:
            self._batches = iter(self._loader)
            for _ in range(step % self.steps_per_epoch):
                next(self._batches)
        rows_RD = next(self._batches).view(self._share_rows, self.blocks.width).to(self._device)
        self._newest = step, rows_RD
        self.wait_seconds += time.perf_counter() - begin
        return rows_RD

    def block_of(self, step: int) -> int:
        """The block whose rows the first rank of one has at `step`."""
        return step % self.steps_per_epoch

    def close(self) -> None:
        self._batches = None
