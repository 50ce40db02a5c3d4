"""LitData's own loader: the same first epoch on one rank, every row once on two, and its pitfalls refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.blocks import Blocks
from plmsae_cli.store.fs import Store
from plmsae_cli.training.litdata_stream import LitDataStream
from plmsae_cli.training.stream import BlockStream

pytest.importorskip("litdata")


def test_the_first_epoch_is_that_of_our_stream_and_seeks_end_where_they_should(folder: str) -> None:
    blocks = Blocks(Store(), folder)
    with BlockStream(blocks, 8, seed=3) as ours, LitDataStream(blocks, 24, 8) as theirs:
        assert theirs.steps_per_epoch == ours.steps_per_epoch == 12
        whole = [ours.rows(step).clone() for step in range(12)]
        for step in [*range(12), 5, 6, 6, 2, 11]:
            assert torch.equal(theirs.rows(step), whole[step]), step
        second = [theirs.rows(step).clone() for step in range(12, 24)]
        assert all(torch.equal(a, b) for a, b in zip(second, whole, strict=True)), "LitData's epochs have one order"
        theirs.rows(0).add_(1)  # its memory is ours to write
        assert theirs.wait_seconds > 0


RANKS = """
import sys, torch
import torch.distributed as dist
import torch.multiprocessing as mp
from plmsae_cli.store.blocks import Blocks
from plmsae_cli.store.fs import Store
from plmsae_cli.training.litdata_stream import LitDataStream

def rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}.meet", rank=rank, world_size=2)
    with LitDataStream(Blocks(Store(), folder), 24, 8, rank, 2) as stream:
        rows = torch.cat([stream.rows(step)[:, 0] for step in range(stream.steps_per_epoch)])
    both = [torch.empty_like(rows) for _ in range(2)]
    dist.all_gather(both, rows)
    if rank == 0:
        seen = torch.cat(both).int().tolist()
        assert len(seen) == len(set(seen)) == 96, sorted(seen)
        print("fine")
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(rank, (sys.argv[1],), nprocs=2)
"""


def test_two_ranks_read_every_row_once(folder: str, tmp_path: Path) -> None:
    import subprocess

    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = subprocess.run(
        [sys.executable, str(script), folder],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "fine" in done.stdout


def test_what_it_would_get_wrong_is_refused(folder: str) -> None:
    blocks = Blocks(Store(), folder)
    with pytest.raises(UserError, match=r"torch\.distributed .* has not been started with 2 ranks"):
        LitDataStream(blocks, 24, 8, 0, 2)
    with pytest.raises(UserError, match="24 rows are not a multiple of the 16 rows"):
        LitDataStream(blocks, 24, 16)
    blocks.folder = "s3://bucket/data"
    with pytest.raises(UserError, match="reads local folders"):
        LitDataStream(blocks, 24, 8)
