"""A disk that fills up while shuffle writes: said with the bytes needed, nothing complete is lost, more room mends it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import plmsae_cli
from plmsae_cli.store.fs import Store
from plmsae_cli.store.housekeeping import damages

Run = Callable[..., subprocess.CompletedProcess[str]]
ASSETS = Path(plmsae_cli.__file__).parent / "data"
YAML = """
root: {root}
data_root: {data}
model: {{weights: bundled}}
embed: {{fasta: {fasta}, layers: [1], holdout: 0.1, dtype: float32, shard: 1MB}}
shuffle: {{seed: 3, memory: 1MB}}
optimize: {{chunk: 1MB, block_rows: 64}}
"""


def test_a_full_disk_in_shuffle_loses_nothing(plmsae: Run, small_disk: Callable[[int], Path], tmp_path: Path) -> None:
    disk = small_disk(64)  # room for the activations and little more
    path = tmp_path / "one.yaml"
    path.write_text(YAML.format(root=tmp_path / "runs", data=disk, fasta=ASSETS / "smoke.fasta.gz"))
    assert plmsae("embed", str(path)).returncode == 0
    (embedded,) = disk.glob("embed-*")
    data = sum(path.stat().st_size for path in embedded.glob("shard-*"))
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "ballast").write_bytes(bytes(free - data * 2 // 3))
    full = plmsae("shuffle", str(path))
    assert full.returncode == 1
    assert "the disk is full" in full.stderr
    assert "bytes needed" in full.stderr
    (shuffled,) = disk.glob("shuffle-*")
    assert not [name for name in os.listdir(shuffled) if name.endswith(".tmp")]
    assert damages(Store(), str(shuffled)) == damages(Store(), str(embedded)) == []
    made = {p: p.stat().st_mtime_ns for p in shuffled.glob("map-*")}
    assert made
    (disk / "ballast").unlink()
    assert plmsae("shuffle", str(path)).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in made} == made  # what was complete was not made again
    assert damages(Store(), str(shuffled)) == []
