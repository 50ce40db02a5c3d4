"""The quickstart itself, with proteins and data on an S3-speaking server: FASTA to report, then nothing twice."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.yaml import load
from plmsae_cli.executors.pipeline import run_experiment
from plmsae_cli.runtime.progress import PlainReporter
from plmsae_cli.store.fs import Store, is_remote
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import verify

ROOT = Path(__file__).parents[1]


@pytest.fixture
def changes(s3: Any, tmp_path: Path) -> list[str]:
    """The quickstart's own YAML, moved to the server; every second protein and fewer tokens, or it would take minutes."""
    fasta = s3.url("inputs", "proteins.fasta.gz")
    text = gzip.decompress((ROOT / "plmsae_cli" / "data" / "proteins.fasta.gz").read_bytes())
    s3.store().write(fasta, [gzip.compress(b"".join(b">" + record for record in text.split(b">")[1::2]))])
    return [
        f"embed.fasta={fasta}",
        f"root={tmp_path / 'runs'}",
        f"data_root={s3.url('data')}",
        f"storage.endpoint_url={s3.endpoint_url}",
        "storage.allow_http=true",
        "train.tokens=120_000",
        "train.lr_warmup_steps=20",
        "eval.fidelity.proteins=12",
        "embed.max_length=80",
    ]


def test_quickstart_on_s3(changes: list[str]) -> None:
    loaded = load(ROOT / "experiments" / "quickstart.yaml", changes)
    experiment = loaded.experiment
    done = run_experiment(experiment, experiment.stages(), PlainReporter(), loaded.text)
    assert set(done.stages) == {"embed", "shuffle", "optimize", "train", "eval"}

    fidelity = json.loads((done.run.path / "eval" / "metrics.json").read_text())["fidelity"]
    assert fidelity["l0_mean"] == pytest.approx(32, abs=0.5)
    # 120 k tokens of the demo model: clearly a dictionary, not yet a good one.
    assert fidelity["fvu"] < 0.35
    assert fidelity["spliced_identity"] == "exact"
    loss = fidelity["loss"]["masked"]
    assert loss["ce"] < loss["ce_sae"] < loss["ce_mean"] < loss["ce_zero"]
    assert 0.5 < loss["recovered_mean"] < loss["recovered_zero"] < 1
    page = (done.run.path / "report" / "index.html").read_text()
    assert "not for science" in page
    assert "<svg" in page

    store, lineage = Store(experiment.storage), Lineage(experiment, Store(experiment.storage))
    for stage in ("embed", "shuffle", "optimize"):
        folder = getattr(lineage, stage)(5).folder
        assert is_remote(folder)
        assert verify(store, folder) == []
    assert run_experiment(experiment, experiment.stages(), PlainReporter(), loaded.text).stages == {}
