"""Tables of a store."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plmsae_cli.store.fs import Store
from plmsae_cli.store.tables import read_table

COUNT = """
import os, sys, pyarrow.parquet
from plmsae_cli.store.fs import Store
from plmsae_cli.store.tables import read_table
before = len(os.listdir("/proc/self/task"))
read_table(Store(), sys.argv[1])
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    table = pa.table({"id": [f"p{i}" for i in range(5000)], "length": list(range(5000)), "nested": [[1, 2]] * 5000})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=1000)
    return tmp_path / "t.parquet"


def test_what_was_written_is_read(path: Path) -> None:
    assert read_table(Store(), str(path)) == pq.read_table(path)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads by /proc")
def test_no_thread_of_arrow_is_left_to_meet_the_end_of_the_interpreter(path: Path) -> None:
    """Such a thread aborts the process now and then, which cannot be waited for in a test."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(path)], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "0\n"
