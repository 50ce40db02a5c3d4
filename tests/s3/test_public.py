"""A public dataset: a folder in somebody's bucket, read without credentials, without a model, without proteins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.executor import plain_http
from plmsae_cli.executors.pipeline import run_experiment
from plmsae_cli.runtime.progress import PlainReporter
from plmsae_cli.store.fs import Store, StoreError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def dataset(s3: Any, tmp_path: Path, smoke_fasta: Path) -> tuple[str, Path]:
    """A dataset in a bucket that lets everybody read its objects by name, and the same in a local folder."""
    experiment = Experiment.model_validate(
        {
            "name": "maker",
            "root": str(tmp_path / "maker"),
            "launch": {"gpus": 0},
            "embed": {"fasta": str(smoke_fasta), "layers": [1], "holdout": 0.1, "shard": "300kB"},
            "shuffle": {},
            "optimize": {"chunk": "256kB", "block_rows": 64},
        }
    )
    run_experiment(experiment, experiment.stages(), PlainReporter())
    (folder,) = (tmp_path / "maker" / "data").glob("optimize-*")
    client = s3.client()
    for file in folder.rglob("*"):
        if file.is_file():
            key = f"public/{file.relative_to(folder)}"
            client.put_object(Bucket=s3.bucket, Key=key, Body=file.read_bytes(), ACL="public-read")
    return str(s3.url("public")), folder


def test_training_needs_no_credentials_no_model_and_no_proteins(
    s3: Any, dataset: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, local = dataset
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    train = {"sae": {"k": 4, "expansion": 2}, "batch_tokens": 256, "tokens": 256 * 30, "lr": 1e-3}
    storage = {"endpoint_url": s3.endpoint_url, "allow_http": True, "anonymous": True}
    bodies = {
        "far": {"storage": storage, "train": {**train, "data": url, "cache": str(tmp_path / "cache")}},
        "near": {"train": {**train, "data": str(local)}},
    }
    saes = []
    for name, body in bodies.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({"root": str(tmp_path / "runs"), "launch": {"gpus": 0}, **body}))
        done = subprocess.run(
            [sys.executable, "-c", "from plmsae_cli.cli.app import main; main()", "run", str(path)],
            capture_output=True, text=True, cwd=tmp_path, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert ("is plain http (storage.allow_http)" in done.stderr) == (name == "far")
        saes.append((tmp_path / "runs" / name / "sae" / "sae.safetensors").read_bytes())
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        assert 0.9 < json.loads(lines[-1])["batch_entropy"] <= 1
    assert saes[0] == saes[1]
    assert list((tmp_path / "cache").glob("??/*")), "several epochs were read once"


def test_a_bucket_that_may_not_be_listed_is_probed_by_name(s3: Any, proxy: Any) -> None:
    client = s3.client()
    client.put_object(Bucket=s3.bucket, Key="public/MANIFEST.json", Body=b"{}", ACL="public-read")
    proxy.fail(r"GET \S+list-type", "403")
    store = Store(proxy.storage(anonymous=True))
    store.probe(s3.url("public"))
    for folder, write in (("public", True), ("private", False)):
        with pytest.raises(StoreError, match="permission denied"):
            store.probe(s3.url(folder), write=write)


@pytest.mark.parametrize(
    ("endpoint", "data", "warned"),
    [
        ("http://10.0.0.1", "s3://b/x", True),
        ("https://10.0.0.1", "s3://b/x", False),
        ("http://10.0.0.1", "/data/x", False),
        (None, "s3://b/x", False),
    ],
)
def test_plain_http_is_said(endpoint: str | None, data: str, warned: bool) -> None:
    storage = {"endpoint_url": endpoint, "allow_http": True}
    experiment = Experiment.model_validate({"name": "x", "storage": storage, "train": {"data": data, "sae": {"k": 4}}})
    assert (plain_http(experiment) is not None) == warned
