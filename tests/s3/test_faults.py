"""Large reads and uploads, and the whole data plane, behind a proxy that misbehaves."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.pipeline import run_experiment
from plmsae_cli.runtime.progress import PlainReporter
from plmsae_cli.store import s3, s3_client
from plmsae_cli.store.fs import Store, StoreError

DATA = np.random.default_rng(1).bytes(12 << 20)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_PART", 5 << 20)  # the least that S3 takes
    monkeypatch.setattr(s3, "_RANGE", 1 << 20)


def open_uploads(server: Any) -> list[Any]:
    return list(server.client().list_multipart_uploads(Bucket=server.bucket).get("Uploads", []))


@pytest.mark.parametrize("fault", ["500", "503", "SlowDown", "reset", "lost"])
@pytest.mark.parametrize("step", [r"POST \S+\?uploads", r"PUT \S+partNumber=2", r"POST \S+uploadId", r"HEAD "])
def test_an_upload_in_parts_survives_faults_that_pass(s3: Any, proxy: Any, step: str, fault: str) -> None:
    proxy.fail(step, fault, times=2)
    record = proxy.store().write(s3.url("x"), [DATA], size=len(DATA))
    assert record.size == len(DATA)
    assert any(fault == seen for _, _, seen in proxy.requests), "the step exists"
    assert s3.store().read(s3.url("x")) == DATA


@pytest.mark.parametrize("fault", ["500", "SlowDown", "reset"])
@pytest.mark.parametrize("step", [r"POST \S+\?uploads", r"PUT \S+partNumber=2", r"POST \S+uploadId"])
def test_an_upload_that_cannot_end_leaves_no_object(s3: Any, proxy: Any, step: str, fault: str) -> None:
    proxy.fail(step, fault)
    with pytest.raises(StoreError, match=r"cannot write s3://\S+/x: "):
        proxy.store().write(s3.url("x"), [DATA])
    attempts = [path for _, path, seen in proxy.requests if seen]
    assert len(attempts) <= 4
    assert not s3.store().exists(s3.url("x"))


def test_a_part_stored_short_is_caught(s3: Any, proxy: Any) -> None:
    proxy.fail(r"PUT \S+partNumber=3", "short", times=1)
    with pytest.raises(StoreError, match="was stored short and removed: 12582912 bytes were sent, 11534336 kept"):
        proxy.store().write(s3.url("x"), [DATA])
    assert not s3.store().exists(s3.url("x"))


@pytest.mark.parametrize("fault", ["500", "503", "reset", "half", "drip"])
def test_a_read_in_pieces_survives_faults_in_the_midst(
    s3: Any, proxy: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "drip":
        monkeypatch.setattr(s3_client, "_CLIENT", {"connect_timeout": "2s", "read_timeout": "2s", "timeout": "2s"})
    data = DATA[: 4 << 20]
    s3.store().write(s3.url("x"), [data])
    store = proxy.store()
    proxy.fail(r"GET ", fault, times=3)
    buffer = bytearray(len(data) - 7)
    store.read_into(s3.url("x"), 7, memoryview(buffer))
    assert buffer == data[7:]
    proxy.fail(r"GET ", fault, times=2)
    assert store.hash(s3.url("x")) == s3.store().hash(s3.url("x"))


def test_pieces_that_stay_broken_end_the_read_and_leave_the_buffer_alone(s3: Any, proxy: Any) -> None:
    s3.store().write(s3.url("x"), [DATA])
    store = proxy.store()
    proxy.fail(r"GET ", "SlowDown")
    buffer = bytearray(len(DATA))
    with pytest.raises(StoreError, match="SlowDown"):
        store.read_into(s3.url("x"), 0, memoryview(buffer))
    proxy.fail("nothing", "")
    asked = len(proxy.requests)
    assert asked <= 4 * len(DATA) >> 20, "four attempts a piece"
    time.sleep(0.3)
    assert len(proxy.requests) == asked, "nothing is fetched behind the error"
    store.read_into(s3.url("x"), 0, memoryview(buffer))
    assert buffer == DATA


def test_a_lost_answer_to_a_record_does_not_lose_the_record(s3: Any, proxy: Any) -> None:
    proxy.fail(r"PUT ", "lost", times=1)
    proxy.store().write_once(s3.url("parts/a.json"), b"mine")
    assert s3.store().read(s3.url("parts/a.json")) == b"mine"


def prepared(folder: Path, data_root: str, storage: Any, fasta: Path) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "run",
            "root": str(folder / "runs"),
            "data_root": data_root,
            "storage": storage.model_dump() if storage is not None else {},
            "launch": {"gpus": 0},
            "embed": {"fasta": str(fasta), "layers": [1], "holdout": 0.1, "shard": "300kB"},
            "shuffle": {"memory": "2MB"},
            "optimize": {"chunk": "256kB", "block_rows": 64},
            "train": {"sae": {"k": 4, "expansion": 2}, "batch_tokens": 128, "tokens": 1280, "lr": 1e-3},
        }
    )


def hashes(store: Store, root: str) -> dict[str, str]:
    manifests = [name for name in store.list(root) if name.endswith("MANIFEST.json")]
    bodies = [json.loads(store.read(f"{root}/{name}")) for name in manifests]
    return {f"{body['stage']}/{file['name']}": file["xxh3"] for body in bodies for file in body["files"]}


def test_the_whole_data_plane_behind_a_bad_link_makes_the_same_bytes(
    s3: Any, proxy: Any, tmp_path: Path, smoke_fasta: Path
) -> None:
    calm = prepared(tmp_path / "calm", str(tmp_path / "data"), None, smoke_fasta)
    run_experiment(calm, calm.stages(), PlainReporter())
    proxy.fail_at_random(0.15, seed=4)
    stormy = prepared(tmp_path / "storm", s3.url("data"), proxy.storage(), smoke_fasta)
    run_experiment(stormy, stormy.stages(), PlainReporter())
    assert len([1 for _, _, fault in proxy.requests if fault]) > 10
    wanted = hashes(Store(), str(tmp_path / "data"))
    assert len(wanted) > 10
    assert hashes(s3.store(), s3.url("data")) == wanted
    saes = [Path(e.root) / "run" / "sae" / "sae.safetensors" for e in (calm, stormy)]
    assert saes[0].read_bytes() == saes[1].read_bytes()
