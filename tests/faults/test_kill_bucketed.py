"""Sorted shards in a bucket, killed while they are written and between two manifests: the blocks are those of a calm start."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plmsae_cli
from plmsae_cli.config.yaml import load
from plmsae_cli.executors.pipeline import run_experiment
from plmsae_cli.runtime.progress import PlainReporter
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import read_manifest, verify

Run = Callable[..., subprocess.CompletedProcess[str]]
FASTA = Path(plmsae_cli.__file__).parent / "data" / "smoke.fasta.gz"
BODY = """
root: {root}
data_root: {data}
storage: {{endpoint_url: {endpoint}, allow_http: true}}
embed: {{fasta: {fasta}, layers: [1], dtype: int8, shard: 300kB, layout: {layout}}}
shuffle: {{seed: 3, memory: 2MB}}
optimize: {{chunk: 128kB, block_rows: 64}}
"""
FAULTS = ["kill:embed.shard-00001.written", "kill:embed.manifest:2"]


def test_killed_and_continued(plmsae: Run, s3: Any, tmp_path: Path) -> None:
    written = {}
    for layout, data in (("plain", str(tmp_path / "data")), ("bucketed", s3.url("data"))):
        path = tmp_path / f"{layout}.yaml"
        values = {"root": tmp_path / layout, "endpoint": s3.endpoint_url, "fasta": FASTA}
        path.write_text(BODY.format(data=data, layout=layout, **values))
        experiment = load(path).experiment
        store = Store(experiment.storage)
        lineage = Lineage(experiment, store)
        if layout == "bucketed":
            for number, fault in enumerate(FAULTS):
                killed = plmsae("optimize", str(path), "--with-inputs", fault=fault)
                assert killed.returncode == -9, f"{fault}: {killed.stderr}"
                assert (read_manifest(store, lineage.embed(1).folder) is not None) == (number == 1)
                assert read_manifest(store, lineage.shuffle(1).folder) is None
        run_experiment(experiment, experiment.stages(), PlainReporter())
        folder = lineage.optimize(1).folder
        assert verify(store, folder) == []
        names = [name for name in store.list(folder) if name.startswith(("chunk-", "stats", "calibration", "heldout"))]
        written[layout] = {name: store.read(join(folder, name)) for name in names}
    assert len(written["plain"]) > 3
    assert written["plain"] == written["bucketed"]
